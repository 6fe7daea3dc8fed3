"""Pretraining objectives, one file each, found by file name: nothing is registered by hand."""

import importlib
import pkgutil
from collections.abc import Sequence
from inspect import isabstract
from typing import Any

from torch import nn

from heatssl.backbones import create_backbone
from heatssl.config import PretrainConfig
from heatssl.errors import UserError, check_choice
from heatssl.objectives.extrapolation import Extrapolation
from heatssl.objectives.limits import check_limits
from heatssl.objectives.objective import Objective, Outputs, Story
from heatssl.objectives.prior import attach_prior

__all__ = [
    "Extrapolation",
    "Objective",
    "Outputs",
    "Story",
    "attach_prior",
    "build",
    "create",
    "names",
    "objective_class",
]


def names() -> list[str]:
    """Names of all objectives: the modules of this package that define an :class:`Objective`."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    return sorted(name for name in modules if _defined_in(name) is not None)


def objective_class(name: str) -> type[Objective]:
    """The class that ``heatssl/objectives/<name>.py`` defines.

    Raises:
        UserError: on an unknown name, with the nearest one.
    """
    check_choice("objective", name, names(), UserError)
    found = _defined_in(name)
    assert found is not None
    return found


def create(
    settings: dict[str, Any],
    backbone: nn.Module,
    image_size: int,
    *,
    mean: Sequence[float] = Objective.mean,
    std: Sequence[float] = Objective.std,
) -> Objective:
    """Build the objective that ``settings['name']`` names, with the other settings as its arguments.

    Args:
        settings: ``name``, and the objective's own.
        backbone: a timm model.
        image_size: pixels of the square images.
        mean: of the colour channels, as subtracted from the images.
        std: of the colour channels, by which the images were divided.

    Raises:
        UserError: on an unknown name or setting, or settings that do not fit the backbone.
    """
    arguments = {key: value for key, value in settings.items() if key != "name"}
    wanted = objective_class(settings["name"])
    try:
        check_limits(arguments)
        objective = wanted(backbone, image_size, **arguments)
    except (TypeError, ValueError) as error:
        raise UserError(f"objective {settings['name']}: {error}") from error
    objective.mean, objective.std = mean, std
    return objective


def build(config: PretrainConfig) -> Objective:
    """The objective of a run with its backbone and prior, untrained: weights from torch's global generator.

    Raises:
        UserError: on settings that cannot work.
    """
    data = config.data
    backbone = create_backbone(config.backbone, data.image_size, **config.backbone_arguments)
    objective = create(config.objective, backbone, data.image_size, mean=data.mean, std=data.std)
    attach_prior(objective, config.prior)
    return objective


def _defined_in(name: str) -> type[Objective] | None:
    module = importlib.import_module(f"{__name__}.{name}")
    classes = [
        value
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Objective) and value.__module__ == module.__name__
    ]
    return next((found for found in classes if found is not Objective and not isabstract(found)), None)
