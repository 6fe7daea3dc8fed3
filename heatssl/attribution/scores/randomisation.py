"""Whether the map depends on what the model has learned."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from heatssl.attribution.scores.ranking import rank_correlation
from heatssl.errors import UserError


def randomisation(maps_of: Callable[[], Tensor], model: nn.Module, twin: nn.Module, *, stages: int = 4) -> Tensor:
    """Rank correlation of the maps with those of the model as its layers, from the last on, become random again.

    The cascading randomisation of Adebayo et al., "Sanity checks for saliency maps", NeurIPS 2018 (arXiv 1810.03292):
    a method whose maps stay (correlation near 1) does not look at what was learned. Compare magnitudes or
    signed maps, whichever is shown.

    Args:
        maps_of: the maps (B, h, w) of the model as it is when called.
        model: its weights are replaced in place, and are the very same afterwards, after an error too.
        twin: the same architecture with random weights.
        stages: each makes an equal share of the layers random; after the last, all are.

    Returns:
        (stages, B) float32 in [-1, 1], layers cumulated from the output on.

    Raises:
        UserError: when the twin is of another architecture.
    """
    before = maps_of()
    layers = _layers_from_the_last(model)
    found = []
    with _restored(model):
        for stage in range(stages):
            first, end = (round(len(layers) * place / stages) for place in (stage, stage + 1))
            _copy(twin, model, [name for layer in layers[first:end] for name in layer])
            found.append(rank_correlation(before, maps_of()))
    return torch.stack(found)


def _layers_from_the_last(model: nn.Module) -> list[list[str]]:
    """Names of weights and statistics by layer: ``blocks.3``, ``layer1.0``, ``norm``, ``patch_embed``."""
    layers: dict[str, list[str]] = {}
    for name in model.state_dict():
        layer = re.match(r"\w+(\.\d+)?", name)
        layers.setdefault(layer[0] if layer else name, []).append(name)
    return list(reversed(layers.values()))


@torch.no_grad()
def _copy(source: nn.Module, model: nn.Module, names: list[str]) -> None:
    there, here = source.state_dict(), model.state_dict()
    for name in names:
        if name not in there or there[name].shape != here[name].shape:
            raise UserError(f"the twin has no {name} like the model's: create it with the same arguments")
        here[name].copy_(there[name])


@contextmanager
def _restored(model: nn.Module) -> Iterator[None]:
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, value in model.state_dict().items():
                value.copy_(kept[name])
