"""Integrated gradients (Sundararajan, Taly and Yan, ICML 2017, arXiv 1703.01365)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
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
    slope = torch.zeros_like(images)
    # Point p is step p // B of image p % B: each chunk then holds few steps of all images.
    every = torch.arange(steps * len(images), device=images.device)
    for point in every.split(chunk):
        owner = point % len(images)
        position = (point.div(len(images), rounding_mode="floor") + 0.5) / steps
        points = (position[:, None, None, None].to(images.dtype) * images[owner]).requires_grad_()
        (gradient,) = torch.autograd.grad(target(points, owner).sum(), points)
        slope.index_add_(0, owner, gradient)
    maps = (images * slope / steps).sum(dim=1)
    rise = _score(target, images, chunk) - _score(target, torch.zeros_like(images), chunk)
    error = (maps.double().sum(dim=(1, 2)) - rise).abs() / rise.abs().clamp_min(1e-12)
    return Attribution(maps.detach(), error)


@torch.no_grad()
def _score(target: Target, images: Tensor, chunk: int) -> Tensor:
    owners = torch.arange(len(images), device=images.device).split(chunk)
    return torch.cat([target(images[owner], owner) for owner in owners]).double()
