"""What timm writes down of a model as it is now: for its data configuration, and for making it again."""

from typing import Any

from timm import models
from torch import Tensor, nn

_records: Any = getattr(models, "_input", None)  # timm from 1.0.31 on; an older one keeps no such record


def tell_timm_of_size(model: nn.Module, size: tuple[int, int]) -> None:
    """The model expects images of another size, rows and columns."""
    if _records is not None:
        _records.update_model_input_size(model, size)


def tell_timm_of_arguments(model: nn.Module, **arguments: Any) -> None:
    """The model is made again with these beside its own, or in their place."""
    if _records is not None:
        _records.update_model_args(model, **arguments)


def grid_of_checkpoint(model: nn.Module, patch_weight: Tensor | None, number: int) -> tuple[int, int] | None:
    """Rows and columns of the ``number`` patches of a checkpoint that timm loads; None: nothing says."""
    if _records is None:
        return None
    trained = getattr(model, "pretrained_model_args", {}).get("trained_grid")
    if trained is not None:
        return trained[0], trained[1]
    grid: tuple[int, int] | None = _records.get_pretrained_grid_size(model, patch_weight, number)
    return grid
