"""Images of another size than in training, by weights as they are."""

from typing import Any

from torch import nn

from heatssl.backbones.geometry import check_whole_patches, map_shape
from heatssl.backbones.patch_encoder import PatchEncoder
from heatssl.errors import UserError


def set_input_size(backbone: nn.Module, image_size: int) -> None:
    """Let a trained backbone see square images of another size; no weight is trained anew.

    A position table is interpolated (timm's way), rotary positions go on with the same step, or follow the grid where
    they are ``interpolated``, convolutions need nothing. What a normaliser holds to be the usual length stays as
    trained. Other positions: :func:`set_positions`.

    Args:
        backbone: any timm model.
        image_size: pixels of a side.

    Raises:
        UserError: on a size that is not a whole number of patches, or that the model cannot take.
    """
    check_whole_patches(backbone, image_size, "image_size")
    try:
        if hasattr(backbone, "set_input_size"):
            backbone.set_input_size(image_size)  # type: ignore[operator]
        map_shape(backbone, image_size)  # which fails where the model is of one size
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{type(backbone).__name__} cannot see images of {image_size} pixels ({reason}): leave image_size out"
        ) from error


def arguments_as_trained(backbone: nn.Module) -> dict[str, Any]:
    """Beside its own, of a model that is made for any input size and computes what this one does."""
    return backbone.made_as_trained() if isinstance(backbone, PatchEncoder) else {}
