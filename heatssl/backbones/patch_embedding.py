"""Timm's patch embedding of some patches only."""

from typing import Any

import torch
from torch import Tensor, nn

from heatssl.errors import UserError


def cut_patches(images: Tensor, visible: Tensor, size: tuple[int, int]) -> Tensor:
    """The pixels of chosen patches, at no cost for the others.

    Args:
        images: (B, 3, H, W), H and W multiples of the patch.
        visible: (K B, n) long, row-major patch indices; row r is of image r % B.
        size: height and width of a patch.

    Returns:
        (K B, n, 3, h, w).
    """
    height, width = size
    # B 3 (rows h) (columns w) -> B rows columns 3 h w is a view; the gather then copies chosen patches only.
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
    image = torch.arange(len(visible), device=images.device) % len(images)
    return patches[image[:, None], visible // patches.shape[2], visible % patches.shape[2]]


def embed_patches(patch_embed: Any, images: Tensor, visible: Tensor) -> Tensor:
    """What ``timm.layers.PatchEmbed`` makes of the chosen patches, at no cost for the others.

    Args:
        patch_embed: of plain patches.
        images: (B, 3, H, W), H and W multiples of the patch; or the chosen patches of them, from :func:`cut_patches`.
        visible: (B, n) long, row-major patch indices.

    Returns:
        (B, n, C).

    Raises:
        UserError: when its patches overlap.
    """
    projection = getattr(patch_embed, "proj", None)
    if not isinstance(projection, nn.Conv2d) or projection.kernel_size != projection.stride:
        raise UserError("the backbone's patch embedding overlaps its patches: choose one with plain patches")
    height, width = projection.stride
    patches = images if images.ndim == 5 else cut_patches(images, visible, (height, width))
    tokens = nn.functional.linear(patches.flatten(2), projection.weight.flatten(1), projection.bias)
    return patch_embed.norm(tokens)
