"""Images of another size than in training, by weights as they are."""

import torch
from torch import nn

from heatssl.backbones.encode import feature_map
from heatssl.backbones.geometry import check_whole_patches
from heatssl.backbones.modes import evaluation_mode
from heatssl.errors import UserError


def set_input_size(backbone: nn.Module, image_size: int) -> None:
    """Let a trained backbone see square images of another size; no weight is trained anew.

    A position table is interpolated (timm's way), rotary positions go on with the same step, convolutions need nothing.
    What a normaliser holds to be the usual length stays as trained. Other positions: :func:`set_positions`.

    Args:
        backbone: any timm model.
        image_size: pixels of a side.

    Raises:
        UserError: on a size that is not a whole number of patches, or that the model cannot take.
    """
    check_whole_patches(backbone, image_size, "image_size")
    parameter = next(backbone.parameters())
    blank = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(image_size)  # type: ignore[operator]
        with torch.no_grad(), evaluation_mode(backbone):
            feature_map(backbone, blank)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(backbone).__name__} cannot see images of {image_size} pixels ({reason}): leave image_size out"
        ) from error
