"""How well heatmaps lie over objects.

All take maps (B, H, W) >= 0, the object ``inside`` (B, H, W) bool, and ``counted`` (B, H, W) bool, the pixels that
count (None: all); they return (B,) float32 in [0, 1], nan for an image that shows no object. An empty map says as much
as a flat one and is scored like one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.attribution.scores.ranking import ends_of_ties
from heatssl.errors import UserError


def pointing_game(maps: Tensor, inside: Tensor, counted: Tensor | None = None, *, tolerance: int = 0) -> Tensor:
    """1 where the maximum lies on the object, else 0; of several maxima, the share that does.

    Zhang et al., "Top-down neural attention by excitation backprop", IJCV 2018 (arXiv 1608.00507).

    Args:
        maps: see this module, as for the other two.
        inside: the object.
        counted: pixels that count.
        tolerance: pixels that the maximum may lie beside the object; the paper has 15 in images of about 500.
    """
    maps, inside, counted = _checked(maps, inside, counted)
    near = _grown(inside, tolerance)
    highest = maps.masked_fill(~counted, -torch.inf).flatten(1)
    highest = (highest == highest.amax(dim=1, keepdim=True)) & counted.flatten(1)
    share = (highest & near.flatten(1)).sum(dim=1) / highest.sum(dim=1).clamp_min(1)
    return _where_objects(share, inside, counted)


def energy_inside(maps: Tensor, inside: Tensor, counted: Tensor | None = None) -> Tensor:
    """Share of the map's sum that lies on the object.

    The energy-based pointing game of Wang et al., "Score-CAM", CVPRW 2020 (arXiv 1910.01279). A flat map
    reaches the object's share of the area.
    """
    maps, inside, counted = _checked(maps, inside, counted)
    energy = maps * counted
    energy = torch.where(energy.sum(dim=(1, 2), keepdim=True) > 0, energy, counted.float())
    return _where_objects((energy * inside).sum(dim=(1, 2)) / energy.sum(dim=(1, 2)), inside, counted)


def average_precision(maps: Tensor, inside: Tensor, counted: Tensor | None = None) -> Tensor:
    """Area under precision over recall of single pixels, as a sum of steps: of thresholds t, (R_t - R_t-1) P_t.

    The definition of scikit-learn's ``average_precision_score``. A flat map reaches the object's share of the area.
    """
    maps, inside, counted = _checked(maps, inside, counted)
    above = _above_thresholds(maps, inside, counted)
    precision = above.hits / above.pixels.clamp_min(1)
    return _where_objects((above.hit * precision).sum(dim=1) / above.objects.clamp_min(1)[:, 0], inside, counted)


def best_iou(maps: Tensor, inside: Tensor, counted: Tensor | None = None) -> Tensor:
    """Intersection over union of the object and the map above a threshold, at the best threshold for each image.

    An upper bound: no one who lacks the mask can choose that threshold.
    """
    maps, inside, counted = _checked(maps, inside, counted)
    return _where_objects(_above_thresholds(maps, inside, counted).iou.amax(dim=1), inside, counted)


def otsu_iou(maps: Tensor, inside: Tensor, counted: Tensor | None = None) -> Tensor:
    """Intersection over union of the object and the map at or above :func:`otsu_threshold`, which sees no mask."""
    maps, inside, counted = _checked(maps, inside, counted)
    above = _above_thresholds(maps, inside, counted)
    return _where_objects(above.iou.gather(1, _otsu_place(above, counted))[:, 0], inside, counted)


def otsu_threshold(maps: Tensor, counted: Tensor | None = None) -> Tensor:
    """The threshold that parts the pixels into two classes of the largest variance between them.

    Otsu 1979 (IEEE Trans. SMC 9(1)), eq. 18, over all values of the map in place of a histogram: with the mean taken
    off, n of N pixels above and S their sum, the variance is S^2 / (n (N - n)) up to a factor. The upper class is
    ``maps >= threshold``; of a flat map it is everything.

    Args:
        maps: (B, H, W).
        counted: (B, H, W) bool; None: all.

    Returns:
        (B,) float32.
    """
    maps, inside, counted = _checked(maps, torch.zeros_like(maps, dtype=torch.bool), counted)
    above = _above_thresholds(maps, inside, counted)
    return above.values.gather(1, _otsu_place(above, counted))[:, 0]


class _Above(NamedTuple):
    """Each pixel's value as a threshold, from the highest down, (B, N)."""

    values: Tensor
    hit: Tensor  # whether that pixel lies on the object, and counts
    hits: Tensor  # such pixels at or above the threshold
    pixels: Tensor  # pixels that count at or above it
    objects: Tensor  # such pixels in all, (B, 1)
    sums: Tensor  # of the values at or above it, the mean of all taken off

    @property
    def iou(self) -> Tensor:
        return self.hits / (self.pixels + self.objects - self.hits).clamp_min(1)


def _above_thresholds(maps: Tensor, inside: Tensor, counted: Tensor) -> _Above:
    # Pixels that do not count go to the end, where nothing lies above or below them.
    values, order = maps.masked_fill(~counted, -torch.inf).flatten(1).sort(dim=1, descending=True)
    ends = ends_of_ties(values)
    counts = counted.flatten(1).gather(1, order)
    hit = inside.flatten(1).gather(1, order) & counts
    known = torch.where(counts, values, 0.0)
    mean = known.sum(dim=1, keepdim=True) / counts.sum(dim=1, keepdim=True).clamp_min(1)
    sums = torch.where(counts, values - mean, 0.0).cumsum(dim=1).gather(1, ends)
    hits, pixels = (part.cumsum(dim=1).gather(1, ends) for part in (hit, counts))
    return _Above(values, hit, hits, pixels, hit.sum(dim=1, keepdim=True), sums)


def _otsu_place(above: _Above, counted: Tensor) -> Tensor:
    """The place of the threshold among the sorted values, (B, 1)."""
    below = counted.flatten(1).sum(dim=1, keepdim=True) - above.pixels
    between = above.sums.square() / (above.pixels * below).clamp_min(1)
    # Where nothing is below there are no two classes; of a flat map the first place then stands for all of it.
    return torch.where(below > 0, between, -1.0).argmax(dim=1, keepdim=True)


def _grown(inside: Tensor, radius: int) -> Tensor:
    """The object and all pixels within a radius of it."""
    if radius < 1:
        return inside
    offsets = torch.arange(-radius, radius + 1, device=inside.device)
    disc = (offsets[:, None] ** 2 + offsets**2 <= radius**2).float()
    return F.conv2d(inside[:, None].float(), disc[None, None], padding=radius)[:, 0] > 0.5


def _where_objects(score: Tensor, inside: Tensor, counted: Tensor) -> Tensor:
    return torch.where((inside & counted).any(dim=2).any(dim=1), score.float(), torch.nan)


def _checked(maps: Tensor, inside: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    counted = torch.ones_like(inside, dtype=torch.bool) if counted is None else counted
    if maps.ndim != 3 or maps.shape != inside.shape or maps.shape != counted.shape:
        raise UserError(
            f"maps and masks must be (B, H, W) of one size, not {tuple(maps.shape)}, {tuple(inside.shape)} and "
            f"{tuple(counted.shape)}"
        )
    return maps.float(), inside.bool(), counted.bool()
