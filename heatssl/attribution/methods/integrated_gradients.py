"""Integrated gradients (Sundararajan, Taly and Yan, ICML 2017, arXiv 1703.01365)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution, completeness_error
from heatssl.attribution.points import input_gradient, owners, scores
from heatssl.attribution.targets import Target


def integrated_gradients(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    steps: int = 32,
    chunk: int = 64,
) -> Attribution:
    """Gradient along the straight path from the mean colour to the image, times the image.

    map = sum over colours of (x - x') times the mean over k of dF/dx at x' + (k - 1/2) / steps (x - x'):
    eq. 3 with the midpoint rule, which converges with the square of the step. The baseline x' is zero in
    normalised space. Completeness (proposition 1): the map sums to F(x) - F(x'); by how much it does not
    tells whether steps suffice.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: the function F.
        steps: points on the path.
        chunk: images per forward pass; memory does not grow with steps or with the batch beyond it.

    Returns:
        Signed maps (B, H, W), and |sum - (F(x) - F(x'))| / |F(x) - F(x')| as the completeness error.
    """
    gradient = torch.zeros_like(images, dtype=torch.float32)
    for owner, step in owners(images, chunk, steps):
        position = ((step + 0.5) / steps).to(images.dtype)[:, None, None, None]
        gradient.index_add_(0, owner, input_gradient(target, position * images[owner], owner, local=False))
    maps = (images.float() * gradient / steps).sum(dim=1)
    rise = scores(target, images, chunk) - scores(target, torch.zeros_like(images), chunk)
    return Attribution(maps, completeness_error(maps, rise))
