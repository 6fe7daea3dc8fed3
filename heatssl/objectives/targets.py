"""Pixels as per-patch vectors, and back."""

from typing import Literal

from torch import Tensor

Target = Literal["normalised", "plain"]


def as_target(images: Tensor, patch: int, target: Target) -> Tensor:
    """What a decoder is asked for: the patches of normalised images (B, 3, h p, w p) as a field (B, 3 p p, h, w).

    ``plain`` as they are; ``normalised`` each less its mean, over its standard deviation (MAE's norm_pix_loss).
    """
    patches = patchify(images, patch)
    if target == "plain":
        return patches
    mean, std = patch_statistics(patches)
    return (patches - mean) / std


def as_images(painted: Tensor, images: Tensor, patch: int, target: Target) -> Tensor:
    """Inverse of :func:`as_target`, for viewing: painted (B, 3 p p, h, w) -> (B, 3, h p, w p).

    With a normalised target a decoder does not know a patch's mean and contrast; those of the true images are put back,
    as in the figures of MAE's paper.
    """
    if target == "normalised":
        mean, std = patch_statistics(patchify(images, patch))
        painted = painted * std + mean
    return unpatchify(painted, patch)


def patchify(images: Tensor, patch: int) -> Tensor:
    """Patches laid out as a field: (B, 3, h p, w p) -> (B, 3 p p, h, w), values in order (colour, row, column)."""
    grid = images.unflatten(3, (-1, patch)).unflatten(2, (-1, patch))  # B 3 h p w q
    return grid.permute(0, 1, 3, 5, 2, 4).flatten(1, 3)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """Inverse of :func:`patchify`: (B, 3 p p, h, w) -> (B, 3, h p, w p)."""
    grid = patches.unflatten(1, (-1, patch, patch))  # B 3 p q h w
    return grid.permute(0, 1, 4, 2, 5, 3).flatten(4, 5).flatten(2, 3)


def patch_statistics(patches: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of each patch over its pixels and colours, as MAE's norm_pix_loss takes them.

    Args:
        patches: (B, 3 p p, h, w).
        epsilon: added to the variance, so that a flat patch can be divided.

    Returns:
        mean and std, each (B, 1, h, w); std is at least sqrt(epsilon).
    """
    mean = patches.mean(dim=1, keepdim=True)
    return mean, (patches.var(dim=1, keepdim=True) + epsilon).sqrt()


def rows(patches: Tensor) -> Tensor:
    """A field of patches as a list of them in row-major order: (B, D, h, w) -> (B, h w, D)."""
    return patches.flatten(2).transpose(1, 2)


def from_rows(patches: Tensor, grid: tuple[int, int]) -> Tensor:
    """Inverse of :func:`rows`: (B, h w, D) -> (B, D, h, w)."""
    return patches.transpose(1, 2).unflatten(2, grid)


def to_pixels(mask: Tensor, patch: int) -> Tensor:
    """A mask of patches as one of pixels: (B, h, w) -> (B, h p, w p)."""
    return mask.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
