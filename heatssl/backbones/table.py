"""``heatssl models``: names, parameters, operations, input sizes."""

import fnmatch
from typing import Any, NamedTuple

import timm
import torch
from torch.utils.flop_counter import FlopCounterMode

from heatssl.config import ModelsConfig
from heatssl.errors import UserError, did_you_mean


class ModelFigures(NamedTuple):
    """What a model costs."""

    name: str
    parameters: int  # with the classifier of timm's configuration
    operations: int  # of one image's forward pass, a multiplication and an addition counted as two
    input_size: tuple[int, ...]  # 3, height, width


def print_models(config: ModelsConfig) -> None:
    """Print a table of the models whose names match.

    Raises:
        UserError: when one of the patterns matches none.
    """
    known = timm.list_models()
    patterns = [pattern.strip() for pattern in config.names.split(",") if pattern.strip()] or [""]
    for pattern in patterns:
        if not fnmatch.filter(known, pattern):
            nearest = did_you_mean(pattern, known)
            raise UserError(f"names={pattern} matches no model{nearest}: use patterns such as gau_* or vit_small_*")
    names = [name for name in known if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
    width = max(map(len, names))
    print(f"{'name':<{width}}  parameters  GFLOP an image  input")
    for name in names:
        figures = model_figures(name)
        size = "x".join(map(str, figures.input_size))
        print(
            f"{name:<{width}}  {figures.parameters / 1e6:8.2f} M  {figures.operations / 1e9:14.2f}  {size}", flush=True
        )


def model_figures(name: str) -> ModelFigures:
    """Counted without weights: the model is made on the meta device, so that large ones cost nothing."""
    with torch.device("meta"), torch.no_grad():
        model: Any = timm.create_model(name).eval().requires_grad_(False)  # the counter hooks views of parameters
        size = model.pretrained_cfg["input_size"]
        with FlopCounterMode(display=False) as counter:
            model(torch.empty(1, *size))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return ModelFigures(name, parameters, counter.get_total_flops(), tuple(size))
