"""Settings of ``heatssl attribute`` that belong to methods, and those that nobody would use."""

import inspect
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from heatssl.attribution.attribute import find_method, method_names
from heatssl.attribution.runs_law import RunsLaw
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.export import is_run
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
        | dict(of_source)
    )
    taken = parameters(name)
    return {key: value for key, value in given.items() if value is not None and key in taken}


def bases_first(methods: Iterable[str]) -> list[str]:
    """Methods in an order in which :func:`with_source` finds the base of every heat flow that has one among them."""
    return sorted(methods, key=lambda name: ("source" in parameters(name), name.count(":")))


def with_source(name: str, options: dict[str, Any], known: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of a heat flow whose base has been asked for beside it, so that its maps are not made twice.

    Args:
        name: of the method.
        options: of it, as of :func:`method_options`.
        known: the maps (B, h, w) of other methods, of the same images and target and by the same settings.
    """
    taken = parameters(name)
    if "source" in taken and taken["base"].default in known:
        return options | {"source": known[taken["base"].default]}
    return options


def options_text(name: str, options: dict[str, Any]) -> str:
    """Those that are not the method's own: ``border=0, seed=1``; ``chunk`` changes no map."""
    taken = parameters(name)
    told = {key: value for key, value in sorted(options.items()) if key not in UNTOLD}
    return ", ".join(f"{key}={_word(value)}" for key, value in told.items() if value != taken[key].default)


def takes(config: AttributeConfig, option: str) -> bool:
    """Whether any method of the command takes an option."""
    return any(option in parameters(method) for method in config.methods)


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
    if not config.methods:
        raise UserError(f"no method is named: use some of {', '.join(method_names())}")
    taken = {method: parameters(method) for method in config.methods}
    given = {key for key, value in vars(AttributeConfig()).items() if getattr(config, key) != value}
    if config.law not in (None, "run", "laplace"):
        raise UserError(f"law={config.law} is none: use run, or laplace")
    for key in (key for key in (*OF_METHODS, "law") if key in given):
        if not any(key in options for options in taken.values()):
            able = ", ".join(method for method in method_names() if key in parameters(method))
            raise UserError(f"{', '.join(config.methods)} takes no {key}: leave it out, or use one of {able}")
    if config.images:
        refuse_unused(config, OF_A_SPLIT, "images of your own")
        needs_data = takes(config, "baselines") or (config.target == "neighbours" and not is_run(config.run))
        if config.data is not None and not needs_data:
            raise UserError("data=... has no effect with images of your own: leave it out")
    if not (config.score or config.scores):
        refuse_unused(config, OF_SCORES, "score=false")


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a method can be told, and what it passes on to its base."""
    own = dict(inspect.signature(find_method(name)).parameters)
    base = own["base"].default if "base" in own else "uniform"
    return own if base == "uniform" else parameters(base) | own


def _word(value: object) -> str:
    if isinstance(value, RunsLaw):
        return type(value.law).__name__
    return f"{value:g}" if isinstance(value, float) else str(value)
