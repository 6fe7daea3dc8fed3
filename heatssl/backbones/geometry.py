"""Where a backbone's features lie on the image: read from the model, never assumed."""

from dataclasses import dataclass

import torch
from torch import nn

from heatssl.backbones.fields import patch_sides
from heatssl.backbones.modes import evaluation_mode
from heatssl.errors import UserError


@dataclass(frozen=True)
class Geometry:
    """The feature grid of a backbone for one image size."""

    rows: int
    columns: int
    channels: int
    stride: int  # pixels of the image per grid position, in both directions
    prefix_tokens: int  # class and register tokens before the patches; 0 for convolutional models

    def quarter(self) -> tuple[int, int]:
        """Rows and columns of one quarter block.

        Raises:
            UserError: when the grid has an odd side, with the image sizes that would work.
        """
        if self.rows % 2 or self.columns % 2:
            below, above = ((self.rows // 2) * 2 * self.stride, (self.rows // 2 + 1) * 2 * self.stride)
            sizes = f"{below} or {above}" if below else f"{above}"
            raise UserError(
                f"a {self.rows}x{self.columns} patch grid cannot be quartered: "
                f"set data.image_size={sizes}, or another patch size, so that both sides are even"
            )
        return self.rows // 2, self.columns // 2


def check_whole_patches(backbone: nn.Module, image_size: int, setting: str) -> None:
    """Where a backbone cuts images into patches, they must fit.

    Raises:
        UserError: naming the setting, and sizes that would do.
    """
    patch = patch_sides(backbone)
    if patch is not None and (image_size < patch[0] or image_size % patch[0]):
        lower = max(image_size, 0) // patch[0] * patch[0]
        raise UserError(
            f"{setting}={image_size} is not a whole number of {patch[0]}-pixel patches: "
            f"use {lower or patch[0]} or {lower + patch[0]}"
        )


def map_shape(backbone: nn.Module, image_size: int) -> tuple[int, int, int]:
    """Channels, rows and columns of the final map, found by showing the backbone one empty image."""
    from heatssl.backbones.encode import feature_map

    parameter = next(backbone.parameters())
    blank = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    with torch.no_grad(), evaluation_mode(backbone):
        channels, rows, columns = feature_map(backbone, blank).shape[1:]
    return channels, rows, columns


def geometry(backbone: nn.Module, image_size: int) -> Geometry:
    """Read the grid from the model, where necessary by running it on one empty image.

    Args:
        backbone: a timm model.
        image_size: pixels of the square input.

    Raises:
        UserError: when the image is not a whole number of patches, or the map is not square or does not divide it.
    """
    check_whole_patches(backbone, image_size, "data.image_size")
    channels, rows, columns = map_shape(backbone, image_size)
    if rows != columns:
        raise UserError(
            f"a square image becomes {rows} x {columns} patches: choose square ones, backbone_arguments.patch_size"
        )
    if image_size % rows:
        # A padded convolution rounds its map up: then a quarter of the map is no quarter of the image.
        raise UserError(
            f"data.image_size={image_size} gives a {rows}x{columns} feature map that does not divide it: "
            f"use a multiple of {2 ** (image_size // rows).bit_length()} pixels"
        )
    prefix = int(getattr(backbone, "num_prefix_tokens", 0))
    return Geometry(rows, columns, channels, image_size // rows, prefix)
