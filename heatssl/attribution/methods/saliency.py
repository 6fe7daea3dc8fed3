"""Saliency maps (Simonyan, Vedaldi and Zisserman, 2014, arXiv 1312.6034)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import input_gradient, owners
from heatssl.attribution.targets import Target


def saliency(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    chunk: int = 64,
) -> Attribution:
    """How much the score changes with each pixel: map = max over colours of |dy / dx| (section 3).

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: the score y.
        chunk: images per forward pass.

    Returns:
        Maps (B, H, W) >= 0; no completeness error.
    """
    maps = [
        input_gradient(target, images[owner], owner, local=True).abs().amax(dim=1) for owner, _ in owners(images, chunk)
    ]
    return Attribution(torch.cat(maps))
