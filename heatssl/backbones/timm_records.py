"""What timm writes down of a model as it is now: for its data configuration, and for making it again."""

from typing import Any

from timm import models
from torch import Tensor, nn

_records: Any = getattr(models, "_input", None)  # timm from 1.0.31 on; an older one keeps no such record


def tell_timm_of_size(model: nn.Module, size: tuple[int, int], **arguments: Any) -> None:
    """The model expects images of another size, rows and columns, and is made again with these arguments."""
    if _records is not None:
        _records.update_model_input_size(model, size, **arguments)


def grid_of_checkpoint(model: nn.Module, patch_weight: Tensor | None, number: int) -> tuple[int, int] | None:
    """Rows and columns of the ``number`` patches of a checkpoint that timm loads; None: nothing says."""
    if _records is None:
        return None
    grid: tuple[int, int] | None = _records.get_pretrained_grid_size(model, patch_weight, number)
    return grid
