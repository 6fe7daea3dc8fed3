"""From what was found to a result with all that it takes to trust it."""

import time
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from heatssl.config import EvaluationConfig
from heatssl.data import Split
from heatssl.evaluation.processes import is_first
from heatssl.evaluation.results import Result, append_results, commit, format_table, hardware, read_results
from heatssl.evaluation.source import Source, open_source, short_digest
from heatssl.files import check_folder


class Accuracy(NamedTuple):
    """Of one protocol: the mean where it has several draws, and their deviation; what was selected to be read."""

    mean: float
    deviation: float | None = None
    selected: str = ""


def backbones_of(source: Source, random_init: bool, seed: int) -> list[tuple[str, nn.Module]]:
    """What is measured: the weights, and beside them, when asked for, their random twin."""
    given = [(source.weights, source.backbone)]
    return given + ([("random_init", source.twin(seed))] if random_init and source.weights == "pretrained" else [])


def result_of(
    source: Source,
    weights: str,
    metric: str,
    accuracy: Accuracy,
    about: str,
    sizes: tuple[int, int],
    config: EvaluationConfig,
    start: float,
    *,
    images: Mapping[Split, str] | None = None,
    view: str = "centre crop",
) -> Result:
    """A number with all that it takes to trust it.

    Args:
        source: what was measured.
        weights: ``pretrained`` or ``random_init``.
        metric: its name.
        accuracy: what was found.
        about: the protocol, as far as images and seed do not say it.
        sizes: images of train, and of those that were tested.
        config: settings of the protocol.
        start: ``time.perf_counter()`` when it began.
        images: see :meth:`heatssl.evaluation.source.Source.key`.
        view: how images became squares.
    """
    images = images or source.digests_for(config)
    return Result(
        metric=metric,
        weights=weights,
        accuracy=accuracy.mean,
        deviation=accuracy.deviation,
        protocol=(
            f"{about} at {source.data.image_size} px, {view}; "
            f"{sizes[0]} train, {sizes[1]} {source.split} images; seed {config.seed}"
        ),
        data=source.data.name,
        split=source.split,
        train_size=sizes[0],
        val_size=sizes[1],
        seed=config.seed,
        seconds=time.perf_counter() - start,
        backbone=source.info.describe(),
        source=source.origin,
        step=source.info.step if weights == "pretrained" else 0,
        hardware=hardware(source.device),
        commit=commit(),
        key=source.key(metric, config, images, weights),
        root=source.root,
        images=short_digest(images),
        selected=accuracy.selected,
    )


def begin(config: EvaluationConfig, *, cache: bool = False, several: bool = False) -> Source:
    """Open the source, and see that its results can be kept before anything costs time.

    Raises:
        UserError: see :func:`heatssl.evaluation.source.open_source`; and on an output that cannot be written.
    """
    source = open_source(config, cache=cache, several=several)
    check_folder(source.output)
    read_results(source.output / "evaluation.json")  # a damaged one would not be added to
    return source


def finish(source: Source, results: list[Result]) -> list[Result]:
    """Print the results and keep them in ``evaluation.json``; what was trained for them is not needed any more."""
    if is_first():
        print(format_table(results), flush=True)  # first: what cannot be written is not lost
        append_results(source.output / "evaluation.json", results)
        for checkpoint in source.checkpoints:
            checkpoint.remove()
    return results
