"""Options of methods that a command takes from its source: the baselines of expected gradients."""

from typing import Any

import torch
from torch import Tensor

from heatssl.attribution.method_settings import takes
from heatssl.attribution.pictures import Pictures, balanced_pictures
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.evaluation.source import Source
from heatssl.export import is_run

BASELINES = 32  # images at most


def options_of_source(config: AttributeConfig, source: Source, given: Pictures | None) -> dict[str, Any]:
    """By name, what some method of the command takes: the same for all its images, batches and scores.

    Args:
        config: settings.
        source: weights and data.
        given: the user's own images; None: those of the split.

    Raises:
        UserError: when there are no images to take baselines from.
    """
    return {"baselines": _baselines(config, source, given)} if takes(config, "baselines") else {}


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
