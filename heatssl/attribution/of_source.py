"""Options of methods that a command takes from its source: baselines of expected gradients, the law of a run."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from heatssl.attribution.extrapolation import load_objective
from heatssl.attribution.method_settings import takes
from heatssl.attribution.pictures import Pictures, balanced_pictures
from heatssl.attribution.runs_law import RunsLaw
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.evaluation.source import Source
from heatssl.export import is_run
from heatssl.heat import Law

BASELINES = 32  # images at most


def options_of_source(config: AttributeConfig, source: Source, given: Pictures | None) -> dict[str, Any]:
    """By name, what some method of the command takes: the same for all its images, batches and scores.

    Args:
        config: settings.
        source: weights and data.
        given: the user's own images; None: those of the split.

    Raises:
        UserError: when there are no images to take baselines from, or no law where that of the run is asked for.
    """
    found: dict[str, Any] = {}
    if takes(config, "baselines"):
        found["baselines"] = _baselines(config, source, given)
    if takes(config, "law"):
        found["law"] = _law(config, source)
    return found


def _law(config: AttributeConfig, source: Source) -> RunsLaw | None:
    """That of the run's objective, which is about the final map of the last weights; None: Laplace's equation."""
    if config.law == "laplace":
        return None
    # The objective that a run keeps is that of the end.
    objective = load_objective(Path(config.run)) if source.kind == "last" and config.layer is None else None
    law, to_field = (getattr(objective, name, None) for name in ("law", "to_field"))
    if isinstance(law, Law) and isinstance(to_field, nn.Module):
        return RunsLaw(to_field, law).to(source.device)
    if config.law == "run":
        raise UserError(
            f"law=run, but there is none of the final map of {config.run}, as qb_heat and finola learn: use law=laplace"
        )
    return None


def _baselines(config: AttributeConfig, source: Source, given: Pictures | None) -> Tensor:
    """(K, 3, S, S): some of the images that are given; of the data, spread over classes, where that is one or none."""
    if given is not None and len(given.images) > 1:
        count = len(given.images)
        return given.images[torch.linspace(0, count - 1, min(count, BASELINES)).round().long()]
    if given is not None and config.data is None and not is_run(config.run):
        raise UserError(
            "expected_gradients takes baselines from other images, there is one: give two or more, or data= data.root="
        )
    return balanced_pictures(config, source, BASELINES).images
