"""Settings of ``heatssl attribute`` that belong to methods, and those that nobody would use."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

from heatssl.attribution.attribute import find_method, method_names
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.unused import refuse_unused

OF_METHODS = ("steps", "samples", "layer", "border")
UNTOLD = ("chunk", "baselines")  # options that no column names
OF_A_SPLIT = ("count", "split", "score_count", "objects", "ignore")
OF_SCORES = ("score_count", "objects", "ignore")


def method_options(name: str, config: AttributeConfig, of_source: Mapping[str, Any]) -> dict[str, Any]:
    """What a method, or the base of its heat flow, takes of the settings and of the source.

    Settings that are null are left to the method. ``of_source``: see
    :func:`heatssl.attribution.of_source.options_of_source`.
    """
    given = (
        {"chunk": config.batch_size, "seed": config.seed}
        | {key: getattr(config, key) for key in OF_METHODS}
        | of_source
    )
    taken = _parameters(name)
    return {key: value for key, value in given.items() if value is not None and key in taken}


def options_text(name: str, options: dict[str, Any]) -> str:
    """Those that are not the method's own: ``border=0, seed=1``; ``chunk`` changes no map."""
    taken = _parameters(name)
    told = {key: value for key, value in sorted(options.items()) if key not in UNTOLD}
    return ", ".join(f"{key}={_word(value)}" for key, value in told.items() if value != taken[key].default)


def takes(config: AttributeConfig, option: str) -> bool:
    """Whether any method of the command takes an option."""
    return any(option in _parameters(method) for method in config.methods)


def check_used(config: AttributeConfig) -> None:
    """A setting without effect would be taken for one that had it.

    Raises:
        UserError: on an unknown method, and on a setting that differs from its default and is not used, or lies
            outside its range.
    """
    if (config.samples is not None and config.samples < 1) or (
        config.border is not None and not 0 <= config.border < math.inf
    ):
        raise UserError("samples must be at least 1 and border at least 0, and finite")
    takes = {method: _parameters(method) for method in config.methods}
    given = {key for key, value in vars(AttributeConfig()).items() if getattr(config, key) != value}
    for key in (key for key in OF_METHODS if key in given):
        if not any(key in parameters for parameters in takes.values()):
            able = ", ".join(method for method in method_names() if key in _parameters(method))
            raise UserError(f"{', '.join(config.methods)} takes no {key}: leave it out, or use one of {able}")
    if config.images:
        refuse_unused(config, OF_A_SPLIT, "images of your own")
    if not (config.score or config.scores):
        refuse_unused(config, OF_SCORES, "score=false")


def _parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a method can be told, and what it passes on to its base."""
    own = dict(inspect.signature(find_method(name)).parameters)
    base = own["base"].default if "base" in own else "uniform"
    return own if base == "uniform" else _parameters(base) | own


def _word(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
