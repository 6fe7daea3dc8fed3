"""Heat flow: another method's map as a source of heat that spreads over the graph of alike positions. Ours."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.attribute import find_method
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.heat_graph import affinity, steady_state
from heatssl.attribution.layers import fields
from heatssl.attribution.targets import Target
from heatssl.errors import UserError

POSITIONS = 64  # of the grid, 8 x 8, that the numbers are stated for
UNIFORM = "uniform"  # in the place of a base method: the same heat everywhere


def heat_flow(
    model: nn.Module,
    images: Tensor,
    target: Target,
    *,
    base: str = "gradcam",
    conductivity: float = 64.0,
    sharpness: float = 2.0,
    neighbours: float = 8.0,
    border: float = 0.1,
    source: Tensor | None = None,
    chunk: int = 64,
    **options: Any,
) -> Attribution:
    """A map at rest after its heat has flowed to positions of like features, and out of the image at its border.

    The heat equation on a graph, du/dt = s - u - lambda (L + b E) u, at its steady state:
    (I + lambda (L + b E)) u = s, L = I - D^-1 W, D the row sums of W, E the number of sides where a position touches
    the border of the image. The source s is the magnitude of the base map on the grid of the final map. The affinity W
    of two positions is max(0, cosine)^sharpness of their final features, the mean over the image taken off, and counts
    1 + ``neighbours`` times where one lies beside the other.

    lambda, ``neighbours`` and b are stated for a grid of 64 positions. On f times as many they are f, f^2 and f^(-1/2)
    times as large, and a finer grid solves the same equation of the image: its second difference takes f times the
    weight, beside a sum over f times the positions that are alike, and f^(1/2) times as many touch the border.

    Background touches the border, or is like what does, and loses its heat there; an object keeps it. With the base
    ``uniform`` the source is the same everywhere: what is left says what hangs together and is cut off from the border,
    whatever the target. It is the time that a random walk takes to leave the image, as in saliency by absorbing Markov
    chains (Jiang et al., ICCV 2013).

    With b = 0 the image is insulated: u is the expected source where a random walk ends that starts at the position,
    goes on with the chance lambda / (1 + lambda) and moves along W. So u then stays within the range of s, a constant s
    stays as it is, and the sum of D u is that of D s.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: what the base method explains.
        base: the method whose map is the source, or ``uniform``.
        conductivity: lambda >= 0, for 64 positions; 0 returns the source.
        sharpness: exponent of the affinity.
        neighbours: >= 0, what being beside each other adds to an affinity, as a multiple of it, for 64 positions.
        border: b >= 0, how well heat leaves through a side, as a share of all ways inside, for 64 positions; 0: it
            does not.
        source: maps of ``base`` (B, h, w) that are there already; None: they are made.
        chunk: images per forward pass and per factorisation of (n, n) matrices, n positions.
        **options: of the base method.

    Returns:
        Maps (B, h, w) >= 0 on the grid of the final map; no completeness error.

    Raises:
        UserError: on what the base method refuses, a model without a final map, numbers below 0 or not finite.
    """
    numbers = {"conductivity": conductivity, "sharpness": sharpness, "neighbours": neighbours, "border": border}
    for name, value in numbers.items():
        if not 0 <= value < math.inf:  # NaN is neither
            raise UserError(f"{name}={value} of heat_flow must be a finite number, at least 0")
    if source is None:
        source = _source(base, model, images, target, chunk=chunk, **options)
    maps = []
    for field, part in zip(fields(model, images, None, chunk), source.detach().float().split(chunk), strict=True):
        on_grid = F.adaptive_avg_pool2d(part[:, None], (field.shape[2], field.shape[3]))[:, 0].abs()
        finer = on_grid[0].numel() / POSITIONS
        weights = affinity(field, sharpness, neighbours * finer**2)
        maps.append(steady_state(on_grid, weights, conductivity * finer, border * finer**-0.5))
    return Attribution(torch.cat(maps))


def _source(base: str, model: nn.Module, images: Tensor, target: Target, **options: Any) -> Tensor:
    if base == UNIFORM:
        return torch.ones(len(images), 1, 1, device=images.device)
    return find_method(base)(model, images, target, **options).maps
