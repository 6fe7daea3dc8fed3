"""What stands around a call: autocast, a graph that is being made of it, a transform of ``torch.func``."""

import torch
from torch import Tensor
from torch.autograd import forward_ad


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast asks for on the device of ``tensor``; None: it does not stand around."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.jit.unused
def must_be_plain() -> bool:
    """Whether whoever runs this knows torch's own operations alone: a larger graph fuses them, transforms map them.

    So does differentiation in forward mode, which has no rule for ours.
    """
    is_graph = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return is_graph or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
