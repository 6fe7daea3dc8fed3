"""From images to scores of their heatmaps: one function for every score, method, target and backbone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from heatssl.attribution import scores as of_maps
from heatssl.attribution.attribute import enlarge, explain, to_unit
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.targets import Target, TargetLike, make_target
from heatssl.backbones import evaluation_mode
from heatssl.errors import UserError, did_you_mean
from heatssl.evaluation import LinearProbe

CENTRE = "centre"  # a control in the place of a method: a map that is bright in the middle of every image


@dataclass(frozen=True)
class Explained:
    """A batch and what a method says of it."""

    model: nn.Module
    images: Tensor  # normalised (B, 3, H, W)
    target: Target  # of these images
    maps: Tensor  # signed (B, H, W)
    completeness_error: Tensor | None
    maps_of: Callable[[Tensor, bool], Tensor]  # images -> their maps; True: of their own target, not of `target`
    inside: Tensor | None  # the object (B, H, W) bool
    counted: Tensor | None  # pixels that count
    twin: nn.Module | None
    chunk: int

    @property
    def shown(self) -> Tensor:
        """What people see: magnitudes (B, H, W) in [0, 1]."""
        return to_unit(self.maps)


@dataclass(frozen=True)
class Score:
    """What a column of the table is."""

    better: Literal["higher", "lower"]
    protocol: str  # one line
    measure: Callable[[Explained], Tensor | None]  # (B,); None: the method has no such number
    quick: bool = True
    masks: bool = False  # whether it needs them


def _against_masks(function: Callable[[Tensor, Tensor, Tensor | None], Tensor]) -> Callable[[Explained], Tensor | None]:
    def measure(found: Explained) -> Tensor | None:
        return None if found.inside is None else function(found.shown, found.inside, found.counted)

    return measure


def _infidelity(found: Explained) -> Tensor:
    squares = of_maps.random_squares(SQUARES, *found.images.shape[2:])
    return of_maps.infidelity(found.target, found.images, found.maps, squares, chunk=found.chunk)


def _sensitivity(found: Explained) -> Tensor:
    return of_maps.max_sensitivity(lambda points: found.maps_of(points, False), found.images, samples=NOISES)


def _randomisation(found: Explained) -> Tensor:
    if found.twin is None:
        raise UserError("randomisation compares with random weights: pass twin=, the same architecture anew")
    maps = lambda: to_unit(found.maps_of(found.images, True))  # noqa: E731
    return of_maps.randomisation(maps, found.model, found.twin, stages=STAGES).mean(dim=0)


STEPS, SQUARES, NOISES, STAGES = 32, 32, 8, 4
SCORES: dict[str, Score] = {
    "pointing": Score("higher", "maximum on the object", _against_masks(of_maps.pointing_game), masks=True),
    "energy": Score("higher", "share of the sum on the object", _against_masks(of_maps.energy_inside), masks=True),
    "average_precision": Score(
        "higher", "of single pixels, mean over images", _against_masks(of_maps.average_precision), masks=True
    ),
    "iou_best": Score(
        "higher", "intersection over union at each map's best threshold", _against_masks(of_maps.best_iou), masks=True
    ),
    "iou_otsu": Score(
        "higher", "intersection over union at Otsu's threshold", _against_masks(of_maps.otsu_iou), masks=True
    ),
    "deletion": Score(
        "lower",
        f"mean of the target while pixels become the mean colour, the highest first, {STEPS} steps",
        lambda found: of_maps.deletion(found.target, found.images, found.maps, steps=STEPS, chunk=found.chunk),
    ),
    "insertion": Score(
        "higher",
        f"mean of the target while pixels come into the blurred image, the highest first, {STEPS} steps",
        lambda found: of_maps.insertion(found.target, found.images, found.maps, steps=STEPS, chunk=found.chunk),
    ),
    "completeness": Score(
        "lower",
        "error of the map's sum, as a share of what it should be; of path methods",
        lambda found: found.completeness_error,
    ),
    "infidelity": Score(
        "lower",
        f"squared error of the target's fall over {SQUARES} random squares of mean colour, maps scaled at best",
        _infidelity,
        quick=False,
    ),
    "sensitivity": Score(
        "lower",
        f"largest relative change of the map under {NOISES} noises of at most 0.02 of a deviation",
        _sensitivity,
        quick=False,
    ),
    "randomisation": Score(
        "lower",
        f"rank correlation with the maps of a model that turns random from the last layer on, mean of {STAGES} stages",
        _randomisation,
        quick=False,
    ),
}


def score(
    model: nn.Module,
    images: Tensor,
    method: str = "gradcam",
    target: TargetLike = "self",
    names: Sequence[str] = (),
    *,
    inside: Tensor | None = None,
    counted: Tensor | None = None,
    probe: LinearProbe | None = None,
    twin: nn.Module | None = None,
    attribution: Attribution | None = None,
    chunk: int = 64,
    **options: Any,
) -> dict[str, Tensor]:
    """Explain a batch and say how well.

    Args:
        model: any timm model, with or without classifier; left as it is.
        images: normalised (B, 3, H, W) on the model's device.
        method: as of :func:`heatssl.attribution.attribute`; or ``centre``, a control that looks at no image.
        target: likewise.
        names: of scores, see ``SCORES``; none: the quick ones that can be given.
        inside: the object (B, H, W) bool, for the scores that need it.
        counted: pixels that count (B, H, W) bool; None: all.
        probe: classifier of the pooled embedding.
        twin: the same architecture with random weights, for ``randomisation``.
        attribution: what the method says of the batch, where that is there already; None: it is asked.
        chunk: images per forward pass.
        **options: of the method, for example ``steps``.

    Returns:
        (B,) float32 for each score; nan where an image has none. A score that the method lacks, such as
        ``completeness`` of Grad-CAM, is left out.

    Raises:
        UserError: on an unknown score, one that lacks masks or a twin, and what :func:`attribute` raises.
    """
    chosen = choose_scores(names, masks=inside is not None)
    with torch.inference_mode(False), evaluation_mode(model):
        images = images.detach().clone()
        bound = make_target(model, images, target, probe)

        def explained(points: Tensor, of: TargetLike) -> Attribution:
            if method == CENTRE:
                return Attribution(_centre(points))
            return explain(model, points, method, of, probe=probe, chunk=chunk, **options)

        first = explained(images, bound) if attribution is None else attribution
        found = Explained(
            model=model,
            images=images,
            target=bound,
            maps=enlarge(first.maps.float(), images),
            completeness_error=first.completeness_error,
            maps_of=lambda points, own: enlarge(explained(points, target if own else bound).maps.float(), images),
            inside=inside,
            counted=counted,
            twin=twin,
            chunk=chunk,
        )
        measured = {name: SCORES[name].measure(found) for name in chosen}
    return {name: values.detach().float() for name, values in measured.items() if values is not None}


def choose_scores(names: Sequence[str], masks: bool) -> list[str]:
    """The scores that the names stand for, in the order of the table.

    Args:
        names: none: the quick ones; ``all``: all; those that lack masks are left out of both.
        masks: whether there are any.

    Raises:
        UserError: on an unknown name, or one that lacks masks.
    """
    able = [name for name, score in SCORES.items() if masks or not score.masks]
    if not names:
        return [name for name in able if SCORES[name].quick]
    if list(names) == ["all"]:
        return able
    if "all" in names:
        others = ", ".join(name for name in names if name != "all")
        raise UserError(f"scores=[all] names all of them, and {others} once more: leave out one or the other")
    for name in names:
        if name not in SCORES:
            hint = did_you_mean(name, SCORES) or ":"
            raise UserError(f"unknown score {name!r}{hint} choose all, or some of {', '.join(SCORES)}")
        if name not in able:
            raise UserError(f"the score {name} needs masks of objects: take data that has them, or another score")
    return [name for name in able if name in names]


def _centre(images: Tensor) -> Tensor:
    """A bell over the middle, a quarter of the side wide: (B, 3, H, W) -> (B, H, W)."""
    rows, columns = (torch.linspace(-2, 2, side, device=images.device) for side in images.shape[2:])
    bell = (-(rows[:, None].square() + columns.square()) / 2).exp()
    return bell.expand(len(images), -1, -1)
