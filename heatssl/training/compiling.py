"""torch.compile of a backbone, in place."""

import contextlib

import torch
from torch import nn


def compile_parts(backbone: nn.Module) -> None:
    """Compile a backbone in place, which leaves the names of its weights as they are.

    Objectives run the parts of a backbone and not its forward, so the parts are compiled: each block of a
    transformer, each stage of a convolutional model.
    """
    parts = getattr(backbone, "blocks", None)
    for part in parts if isinstance(parts, nn.Sequential | nn.ModuleList) else backbone.children():
        part.compile()


def eager() -> contextlib.AbstractContextManager[object]:
    """Run compiled parts uncompiled: evaluation has other shapes, each of which would be compiled anew."""
    if hasattr(torch.compiler, "set_stance"):  # torch 2.6
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()
