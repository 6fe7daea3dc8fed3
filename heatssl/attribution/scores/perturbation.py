"""Whether the target changes where the map says so: parts of the image are replaced, and the target is asked again.

``target(points, owner)`` is a target of these images, see :func:`heatssl.attribution.targets.make_target`; ``chunk`` is
the number of images per forward pass, on which memory depends and results do not.
"""

from typing import Literal

import torch
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from heatssl.attribution.targets import Target
from heatssl.errors import UserError

Baseline = Literal["mean", "blurred"] | Tensor
BLUR = 1 / 16  # standard deviation of the blur, as a share of the image's side


def deletion(
    target: Target, images: Tensor, maps: Tensor, *, steps: int = 32, baseline: Baseline = "mean", chunk: int = 64
) -> Tensor:
    """Area under the target's curve while pixels are deleted, the most important first: low is good.

    Petsiuk, Das and Saenko, "RISE", BMVC 2018 (arXiv 1806.07421). Their curve is of a probability, this one of any
    target, in its own unit.

    Args:
        target: of these images.
        images: normalised (B, 3, H, W).
        maps: (B, H, W), the higher the more important; of equal pixels, the order is random and always the same.
        steps: of the curve, each deleting an equal share of the pixels.
        baseline: what comes in their place: the mean colour, the blurred image, or images (B, 3, H, W).
        chunk: see this module.

    Returns:
        (B,) float32.
    """
    end = baseline_of(images, baseline)
    return area(perturbation_curve(target, images, end, maps, steps=steps, chunk=chunk))


def insertion(
    target: Target, images: Tensor, maps: Tensor, *, steps: int = 32, baseline: Baseline = "blurred", chunk: int = 64
) -> Tensor:
    """Area under the target's curve while pixels come into the baseline, the most important first: high is good.

    Source and arguments as of :func:`deletion`.
    """
    start = baseline_of(images, baseline)
    return area(perturbation_curve(target, start, images, maps, steps=steps, chunk=chunk))


@torch.no_grad()
def perturbation_curve(
    target: Target, start: Tensor, end: Tensor, maps: Tensor, *, steps: int = 32, chunk: int = 64
) -> Tensor:
    """The target while pixels of ``start`` turn into those of ``end``, the highest of the map first.

    Args:
        target: of these images.
        start: normalised (B, 3, H, W).
        end: as many.
        maps: (B, H, W).
        steps: at step k, the first k / steps of the pixels are those of ``end``.
        chunk: see this module.

    Returns:
        (B, steps + 1) float32.

    Raises:
        UserError: on maps of another size than the images, or no step.
    """
    if maps.shape != (len(start), *start.shape[2:]) or steps < 1:
        raise UserError(
            f"maps must be (B, H, W) like images (B, 3, H, W) and steps at least 1, not {tuple(maps.shape)}, "
            f"{tuple(start.shape)} and {steps}"
        )
    batch, pixels = len(start), maps[0].numel()
    place = _places(maps)
    curve = start.new_empty(batch, steps + 1, dtype=torch.float32)
    for points in torch.arange((steps + 1) * batch, device=start.device).split(chunk):
        step, owner = points.div(batch, rounding_mode="floor"), points % batch
        replaced = place[owner] < (step * pixels / steps).round()[:, None]
        mixed = torch.where(replaced.view(-1, 1, *maps.shape[1:]), end[owner], start[owner])
        curve[owner, step] = target(mixed, owner).float()
    return curve


def area(curve: Tensor) -> Tensor:
    """Mean height of curves over [0, 1] by the trapezoid rule: (B, steps + 1) -> (B,)."""
    return torch.trapezoid(curve, dx=1 / (curve.shape[1] - 1), dim=1)


def baseline_of(images: Tensor, baseline: Baseline) -> Tensor:
    """Images with nothing to see, like ``images`` (B, 3, H, W): the mean colour, or blurred over 1/16 of the side."""
    if isinstance(baseline, Tensor):
        return baseline.expand_as(images)
    if baseline == "mean":
        return torch.zeros_like(images)  # normalised images have their mean there
    deviation = BLUR * min(images.shape[2:])
    reach = min(round(2 * deviation), min(images.shape[2:]) - 1)
    return F.gaussian_blur(images, [2 * reach + 1, 2 * reach + 1], [deviation, deviation])


def _places(maps: Tensor) -> Tensor:
    """The place of each pixel, the highest first: (B, H, W) -> (B, N) long."""
    values = maps.float().flatten(1)
    # Coarse and rectified maps have many equal pixels: row by row, they would be replaced from the top.
    shuffled = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(0)).to(values.device)
    order = shuffled[values[:, shuffled].argsort(dim=1, descending=True, stable=True)]
    return torch.empty_like(order).scatter_(
        1, order, torch.arange(values.shape[1], device=order.device).expand_as(order)
    )


@torch.no_grad()
def infidelity(
    target: Target,
    images: Tensor,
    maps: Tensor,
    masks: Tensor,
    *,
    baseline: Baseline = "mean",
    scaled: bool = True,
    chunk: int = 64,
) -> Tensor:
    """Mean square by which the map mistakes the target's fall when a part of the image is replaced: low is good.

    Yeh et al., "On the (in)fidelity and sensitivity of explanations", NeurIPS 2019 (arXiv 1901.09392), definition 2.1:
    E over I of (I . map - (f(x) - f(x without I)))^2, I being the parts in ``masks``.

    Args:
        target: of these images.
        images: normalised (B, 3, H, W).
        maps: signed (B, H, W), each pixel's share in the target.
        masks: (S, H, W), 1 where the image is replaced; the same for all images, see :func:`random_squares`.
        baseline: what comes in its place, see :func:`deletion`.
        scaled: multiply each map by the factor that serves it best, as the authors' code does: a map's unit then plays
            no part.
        chunk: see this module.

    Returns:
        (B,) float32, in the square of the target's unit.
    """
    batch, hidden = len(images), baseline_of(images, baseline)
    masks = masks.to(images)
    predicted = torch.einsum("shw,bhw->bs", masks.float(), maps.to(images.device).float())
    every = torch.arange(batch, device=images.device)
    whole = torch.cat([target(images[owner], owner).float() for owner in every.split(chunk)])
    fall = torch.empty_like(predicted)
    for points in torch.arange(len(masks) * batch, device=images.device).split(chunk):
        sample, owner = points.div(batch, rounding_mode="floor"), points % batch
        mixed = torch.lerp(images[owner], hidden[owner], masks[sample, None])
        fall[owner, sample] = whole[owner] - target(mixed, owner).float()
    if scaled:
        power = predicted.square().sum(dim=1, keepdim=True)
        factor = (predicted * fall).sum(dim=1, keepdim=True) / power.clamp_min(torch.finfo(power.dtype).tiny)
        predicted = factor * predicted
    return (predicted - fall).square().mean(dim=1)


def random_squares(count: int, height: int, width: int, seed: int = 0) -> Tensor:
    """Squares of an eighth to a half of the shorter side at random places: (count, H, W) float32, 1 inside."""
    generator = torch.Generator().manual_seed(seed)
    shorter = min(height, width)
    smallest, largest = max(1, shorter // 8), max(1, shorter // 2)
    masks = torch.zeros(count, height, width)
    for mask in masks:
        side = int(torch.randint(smallest, largest + 1, (), generator=generator))
        top = int(torch.randint(height - side + 1, (), generator=generator))
        left = int(torch.randint(width - side + 1, (), generator=generator))
        mask[top : top + side, left : left + side] = 1
    return masks
