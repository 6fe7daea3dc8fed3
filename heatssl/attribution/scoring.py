"""``heatssl attribute score=true``: methods and scores over all images of a split, a batch at a time."""

import hashlib
import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from heatssl.attribution.attribute import explain
from heatssl.attribution.method_settings import bases_first, method_options, options_text, with_source
from heatssl.attribution.pictures import Pictures, class_names, open_images, split_of
from heatssl.attribution.score import CENTRE, SCORES, choose_scores, score
from heatssl.attribution.score_table import Row
from heatssl.attribution.scores import bootstrap_interval
from heatssl.attribution.target_setting import Wish
from heatssl.config import AttributeConfig
from heatssl.data import (
    BadFiles,
    MaskedData,
    Subset,
    balanced_subset,
    digest,
    eval_loader,
    has_masks,
    normalise,
)
from heatssl.data.crop import centre_crop_mask
from heatssl.data.masked import read_mask
from heatssl.errors import UserError
from heatssl.evaluation.results import commit, hardware
from heatssl.evaluation.source import Source
from heatssl.progress_bar import progress_bar

log = logging.getLogger(__name__)

SHORT = 12  # letters of a digest: enough for people to tell images apart
PerImage = dict[tuple[str, str], dict[str, float]]  # method and name of an image -> its scores


@dataclass(frozen=True)
class _Part:
    """A batch to score."""

    pictures: Pictures
    inside: Tensor | None = None  # the object, (B, S, S) bool
    counted: Tensor | None = None  # pixels that count, likewise


@dataclass(frozen=True)
class _Images:
    """All that is scored."""

    parts: Iterator[_Part]
    count: int
    masks: str  # what the object is, "" where there are no masks
    data: str
    split: str
    root: str
    digest: Callable[[], str]  # late: it asks for the state of every file


def check_scores(given: Pictures | None, source: Source, config: AttributeConfig) -> None:
    """What :func:`measure_scores` can refuse before any map is made: arguments and errors are its own."""
    _chosen(given, source, config)


def measure_scores(
    wish: Wish, given: Pictures | None, source: Source, config: AttributeConfig, of_source: Mapping[str, Any]
) -> tuple[list[Row], PerImage]:
    """Score every method, and the control ``centre``, by every score asked for. Memory holds one batch and the scores.

    Args:
        wish: the target.
        given: the user's own images; None: those of the split.
        source: weights and data.
        config: which methods, scores and images.
        of_source: options of methods, see :func:`heatssl.attribution.of_source.options_of_source`.

    Returns:
        A row for each method and score, and the scores of single images.

    Raises:
        UserError: on scores that need masks where there are none, masks without the object, methods that have none of
            the scores, and on images or masks that cannot be used.
    """
    images, names = _chosen(given, source, config)
    twin = source.twin(config.seed).to(source.device) if "randomisation" in names else None
    methods = [*dict.fromkeys(config.methods), CENTRE]
    order = [*bases_first(methods[:-1]), CENTRE]
    per_image: PerImage = {}
    seconds = dict.fromkeys(methods, 0.0)
    options = {method: method_options(method, config, of_source) for method in config.methods}
    options[CENTRE] = {"chunk": config.batch_size}
    with progress_bar(total=images.count * len(methods), name="scores", unit="map") as bar:
        for part in images.parts:
            target, maps = wish.of(part.pictures), dict[str, Tensor]()
            for method in order:
                start = time.perf_counter()
                attribution = None
                if method != CENTRE:
                    with_base = with_source(method, options[method], maps)
                    attribution = explain(
                        source.backbone, part.pictures.images, method, target, probe=wish.probe, **with_base
                    )
                    maps[method] = attribution.maps
                found = score(
                    source.backbone,
                    part.pictures.images,
                    method,
                    target,
                    names,
                    inside=part.inside,
                    counted=part.counted,
                    probe=wish.probe,
                    twin=twin,
                    attribution=attribution,
                    **options[method],
                )
                seconds[method] += time.perf_counter() - start
                for name, values in found.items():
                    for image, value in zip(part.pictures.names, values.tolist(), strict=True):
                        per_image.setdefault((method, image), {})[name] = value
                bar.update(len(part.pictures.names))
            if not per_image:
                raise UserError(
                    f"none of {', '.join(config.methods)} has the score {' or '.join(names)}, which path methods have: "
                    "add methods=[integrated_gradients], or choose another score"
                )
    if not per_image:
        raise UserError(f"none of the {images.count} images can be read: check data.root={source.data.root}")
    looked_at = len({image for _, image in per_image})
    about = _about(wish, images, source, config) | {"scored": looked_at}
    rows = []
    for method, name in itertools.product(methods, names):
        scored = [found[name] for (of, _), found in per_image.items() if of == method and name in found]
        known = [value for value in scored if not math.isnan(value)]
        if known:
            masks = images.masks if SCORES[name].masks else ""
            changed = "" if method == CENTRE else options_text(method, options[method])
            told = ", ".join(filter(None, [changed, source.size]))
            rows.append(_row(method, name, known, seconds[method], about | {"masks": masks, "options": told}))
    for name in set(config.scores) & set(names) - {row.score for row in rows}:
        log.warning("no map has the score %s: it is left out of the table", name)
    return rows, per_image


def _chosen(given: Pictures | None, source: Source, config: AttributeConfig) -> tuple[_Images, list[str]]:
    """Images, which are not read yet, and the names of the scores."""
    images = _of_split(source, config) if given is None else _given(given, config.batch_size)
    return images, choose_scores(config.scores, masks=bool(images.masks))


def _about(wish: Wish, images: _Images, source: Source, config: AttributeConfig) -> dict[str, object]:
    return {
        "target": wish.description,
        "data": images.data,
        "split": images.split,
        "root": images.root,
        "digest": images.digest()[:SHORT],
        "seed": config.seed,
        "source": source.origin,
        "backbone": source.info.describe(),
        "step": source.info.step,
        "hardware": hardware(source.device),
        "commit": commit(),
    }


def _row(method: str, name: str, values: list[float], seconds: float, about: dict[str, object]) -> Row:
    low, high = bootstrap_interval(values)
    return Row(
        method=method,
        score=name,
        mean=float(np.mean(values)),
        low=low,
        high=high,
        better=SCORES[name].better,
        images=len(values),
        seconds=round(seconds, 1),
        protocol=SCORES[name].protocol,
        **about,  # type: ignore[arg-type]
    )


def _given(pictures: Pictures, batch_size: int) -> _Images:
    count = len(pictures.names)

    def parts() -> Iterator[_Part]:
        for first in range(0, count, batch_size):
            here = slice(first, first + batch_size)
            yield _Part(Pictures(pictures.images[here], pictures.names[here], pictures.labels[here]))

    return _Images(parts(), count, "", "images", "given", "", lambda: _digest_of_files(pictures.names))


def _digest_of_files(paths: list[str]) -> str:
    """Hash of paths and contents, in order."""
    found = hashlib.sha256()
    for path in paths:
        found.update(f"{path}\n".encode("utf-8", "surrogateescape"))
        found.update(hashlib.sha256(Path(path).expanduser().read_bytes()).digest())
    return found.hexdigest()


def _of_split(source: Source, config: AttributeConfig) -> _Images:
    """The images of a split, or some of them, with masks where there are any."""
    split = split_of(config)
    data, masked = open_images(source.data, split), has_masks(source.data, split)
    count = len(data) if config.score_count is None else config.score_count
    if count < 1:
        raise UserError(f"score_count={count} leaves no image: use at least 1, or null for all")
    chosen = balanced_subset(data, count, config.seed)
    if not masked and (config.objects, config.ignore) != ([1], []):
        raise UserError("objects and ignore are values of masks, and these images have none: leave them out")
    if masked and any(SCORES[name].masks for name in choose_scores(config.scores, masks=True)):
        _check_objects(chosen, source, config)
    loader = eval_loader(chosen, source.data, batch_size=config.batch_size)
    bad = BadFiles(source.data.bad_fraction)

    def parts() -> Iterator[_Part]:
        for batch in loader:
            bad.update(batch)
            if not len(batch.images):
                continue
            places = batch.indices.tolist()
            pictures = Pictures(
                normalise(batch.images.to(source.device), source.data),
                [chosen.name(place) for place in places],
                class_names(data, batch),
            )
            yield _Part(pictures, *(_masks(chosen, places, source, config) if masked else ()))
        bad.check()

    told = f"object: values {list(config.objects)} of the masks, {list(config.ignore)} ignored" if masked else ""
    name = split if split == "train" else source.split
    return _Images(parts(), len(chosen), told, source.data.name, name, source.root or "", lambda: digest(data))


def _masks(chosen: Subset, places: list[int], source: Source, config: AttributeConfig) -> tuple[Tensor, Tensor]:
    """Where the object is, and which pixels count, of images at some places of a subset: (B, S, S) bool twice."""
    masks = torch.stack([_mask(chosen, place, source) for place in places]).to(source.device)
    objects, ignored = (torch.tensor(wanted, dtype=torch.uint8) for wanted in (config.objects, config.ignore))
    return torch.isin(masks, objects.to(masks.device)), ~torch.isin(masks, ignored.to(masks.device))


def _mask(chosen: Subset, place: int, source: Source) -> Tensor:
    """Classes (S, S) uint8 of the square that the backbone sees."""
    data: MaskedData = chosen.data  # type: ignore[assignment]
    return centre_crop_mask(read_mask(data, int(chosen.indices[place])), source.data.image_size)


def _check_objects(chosen: Subset, source: Source, config: AttributeConfig) -> None:
    """Before any map is made: some mask must show an object. The first one that does ends the search.

    Raises:
        UserError: when none does, with the values that they do hold; on values that are asked for and ignored.
    """
    both = sorted(set(config.objects) & set(config.ignore))
    if both:
        raise UserError(f"objects and ignore both hold {both}: a value is the object or counts nowhere")
    held: set[int] = set()
    for place in progress_bar(range(len(chosen)), name="masks", unit="mask"):
        try:
            held |= set(_mask(chosen, place, source).unique().tolist())
        except UserError:  # told, or skipped with its image, when its turn comes
            continue
        if held & set(config.objects):
            return
    if held:
        raise UserError(
            f"no mask of {config.split} holds a value of objects={list(config.objects)}, they hold {sorted(held)}: "
            "set objects to those of the object, or scores=[deletion,insertion], which need no masks"
        )
