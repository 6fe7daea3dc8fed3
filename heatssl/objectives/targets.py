"""Pixels as per-patch vectors, and back."""

from torch import Tensor


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


def to_pixels(mask: Tensor, patch: int) -> Tensor:
    """A mask of patches as one of pixels: (B, h, w) -> (B, h p, w p)."""
    return mask.repeat_interleave(patch, dim=1).repeat_interleave(patch, dim=2)
