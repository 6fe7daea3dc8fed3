"""A target at many points that stem from the images of one batch, some at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor

from heatssl.attribution.targets import Target
from heatssl.progress_bar import progress_bar


def owners(images: Tensor, chunk: int, points: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """Which points are computed together, when every image (B, 3, H, W) has as many; a bar after two seconds.

    Yields:
        the image that each point stems from, and its number among that image's points: (n,) long each, n at most
        ``chunk``. All images come with their first point, then all with their second: a chunk holds few points of many
        images.
    """
    chunks = torch.arange(points * len(images), device=images.device).split(chunk)
    for every in progress_bar(chunks, name="points", unit="chunk"):
        yield every % len(images), every.div(len(images), rounding_mode="floor")


@torch.no_grad()
def scores(target: Target, images: Tensor, chunk: int) -> Tensor:
    """The target at each image: (B, 3, H, W) -> (B,) float64."""
    return torch.cat([target(images[owner], owner) for owner, _ in owners(images, chunk)]).double()


def input_gradient(target: Target, points: Tensor, owner: Tensor, *, local: bool) -> Tensor:
    """Gradient of each point's score at that point: (n, 3, H, W) -> (n, 3, H, W) float32.

    Args:
        target: what is differentiated.
        points: normalised.
        owner: (n,), the image of each.
        local: see :mod:`heatssl.attribution.targets`; True where the gradient is taken at the image itself.
    """
    points = points.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(target(points, owner, local=local).sum(), points)
    return gradient.float()
