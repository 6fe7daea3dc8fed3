"""Timm's patch embedding of some patches only."""

from typing import Any

import torch
from torch import Tensor, nn

from heatssl.errors import UserError


def embed_patches(patch_embed: Any, images: Tensor, visible: Tensor) -> Tensor:
    """What ``timm.layers.PatchEmbed`` makes of the chosen patches, at no cost for the others.

    Args:
        patch_embed: of plain patches.
        images: (B, 3, H, W), H and W multiples of the patch.
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
    batch, colours = images.shape[:2]
    # B 3 (rows p) (columns q) -> B rows columns 3 p q is a view; the gather then copies visible patches only.
    patches = images.unflatten(3, (-1, width)).unflatten(2, (-1, height)).permute(0, 2, 4, 1, 3, 5)
    row, column = visible // patches.shape[2], visible % patches.shape[2]
    chosen = patches[torch.arange(batch, device=images.device)[:, None], row, column]
    tokens = nn.functional.linear(
        chosen.reshape(batch, visible.shape[1], colours * height * width),
        projection.weight.flatten(1),
        projection.bias,
    )
    return patch_embed.norm(tokens)
