"""The same source at several steps of its training."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from heatssl.errors import UserError
from heatssl.evaluation.source import Source, fit_images
from heatssl.export import is_run, kept_backbones, load_backbone, run_folder


def check_checkpoints(run: str) -> dict[int, Path]:
    """Step -> weights, ascending, of a run that has kept several.

    Raises:
        UserError: when ``run`` is no run, or has kept one step only.
    """
    if not is_run(run):
        raise UserError(f"{run} is no run and has no checkpoints: use checkpoints=false")
    kept = kept_backbones(run_folder(run))
    if len(kept) < 2:
        raise UserError(
            f"{run} has kept the weights of one step only: pretrain with trainer.keep_every=N, or use checkpoints=false"
        )
    return kept


def at_each_step(source: Source, kept: dict[int, Path]) -> Iterator[Source]:
    """The source with the weights of each step, one after the other."""
    for path in kept.values():
        backbone, info = load_backbone(path)
        info = fit_images(backbone, info, source.info.image_size)
        yield replace(source, backbone=backbone.to(source.device).eval(), info=info)
