"""Whether every method of a command can explain what it is given, seen before anything is written."""

from dataclasses import replace
from typing import Any

from heatssl.attribution.attribute import explain
from heatssl.attribution.method_settings import method_options, parameters
from heatssl.attribution.pictures import Pictures
from heatssl.attribution.target_setting import Wish
from heatssl.config import AttributeConfig
from heatssl.errors import UserError
from heatssl.evaluation.source import Source


def check_fitness(
    wish: Wish, pictures: Pictures, source: Source, config: AttributeConfig, of_source: dict[str, Any]
) -> None:
    """Try each method on the first image.

    Raises:
        UserError: when a method refuses, with its reason, and which methods to leave out.
    """
    refused = refusals(wish, pictures, source, config, of_source)
    if not refused:
        return
    method, reason = next(iter(refused.items()))
    if len(refused) == len(config.methods):
        raise reason
    raise UserError(f"{method}: {reason}; leave out {', '.join(refused)}, the other methods can do this") from reason


def refusals(
    wish: Wish, pictures: Pictures, source: Source, config: AttributeConfig, of_source: dict[str, Any]
) -> dict[str, UserError]:
    """The methods that cannot explain the first image, and why; each is tried as cheaply as it can work."""
    first = replace(pictures, images=pictures.images[:1], names=pictures.names[:1], labels=pictures.labels[:1])
    cheap = {"steps": 1, "samples": 1, "window": min(first.images.shape[2:])}
    refused: dict[str, UserError] = {}
    for method in config.methods:
        options = method_options(method, config, of_source)
        options |= {key: value for key, value in cheap.items() if key in parameters(method)}
        try:
            explain(source.backbone, first.images, method, wish.of(first), probe=wish.probe, **options)
        except UserError as error:
            refused[method] = error
    return refused
