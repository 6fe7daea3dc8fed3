"""Where a classifier reads a backbone: a layer, and a way to pool its positions; all of them in one forward pass."""

from collections.abc import Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from heatssl.backbones import as_field, pooled_features
from heatssl.errors import UserError

POOLINGS = {
    "mean": "mean over positions",
    "max": "largest over positions",
    "class": "class token",
    "class_mean": "class token beside the mean over positions",
}


class Readout(NamedTuple):
    """One place to read at."""

    layer: int | None  # a block of a transformer, a stage of a convolutional model; None: the final features
    pooling: str  # one of POOLINGS

    def __str__(self) -> str:
        return ("final layer" if self.layer is None else f"layer {self.layer}") + f", {POOLINGS[self.pooling]}"


FINAL = Readout(None, "mean")  # what everything reads that is not told otherwise


def readouts_of(backbone: nn.Module, layers: Sequence[int], poolings: Sequence[str]) -> tuple[Readout, ...]:
    """All pairs of layer and pooling, each once.

    Args:
        backbone: a timm model.
        layers: indices of its ``feature_info``, which timm's ``forward_intermediates`` takes; -1 is the last. None at
            all: the final features.
        poolings: of :data:`POOLINGS`.

    Raises:
        UserError: on a layer or a token that the backbone lacks, or an unknown pooling.
    """
    name = type(backbone).__name__
    unknown = [pooling for pooling in poolings if pooling not in POOLINGS]
    if unknown or not poolings:
        raise UserError(f"unknown pooling {unknown[0] if unknown else ''!r}: choose among {', '.join(POOLINGS)}")
    if any(pooling.startswith("class") for pooling in poolings) and getattr(backbone, "cls_token", None) is None:
        raise UserError(f"{name} has no class token: use pooling=mean or max")
    depth = len(getattr(backbone, "feature_info", []))
    if layers and not (depth and hasattr(backbone, "forward_intermediates")):
        raise UserError(f"{name} gives no features of its inner layers: leave layers out")
    outside = [layer for layer in layers if not -depth <= layer < depth]
    if outside:
        raise UserError(f"{name} has no layer {outside[0]}: they are 0 to {depth - 1}, or -1 to -{depth} from the last")
    places: list[int | None] = [layer % depth for layer in layers] if layers else [None]
    return tuple(dict.fromkeys(Readout(*pair) for pair in product(places, poolings)))


def read(backbone: Any, images: Tensor, readouts: Sequence[Readout]) -> list[Tensor]:
    """Features of every readout, in one forward pass: normalised images (B, 3, S, S) -> one (B, C) each.

    Inner layers pass the model's final norm where timm applies it to them, as in DINOv2's evaluation
    (arXiv 2304.07193).
    """
    if tuple(readouts) == (FINAL,):
        return [pooled_features(backbone, images)]
    with_class = any(readout.pooling.startswith("class") for readout in readouts)
    layers: list[Any] = sorted({readout.layer for readout in readouts if readout.layer is not None})
    outputs = _inner(backbone, images, layers, with_class) if layers else [_final(backbone, images, with_class)]
    found: dict[int | None, tuple[Tensor, Tensor | None]] = dict(zip(layers or [None], outputs, strict=True))
    return [_pool(*found[readout.layer], readout.pooling) for readout in readouts]


def _final(backbone: Any, images: Tensor, with_class: bool) -> tuple[Tensor, Tensor | None]:
    """Field (B, C, h, w) and class token (B, C) of the final layer."""
    output = backbone.forward_features(images)
    return as_field(backbone, output, images), output[:, 0] if with_class else None


def _inner(backbone: Any, images: Tensor, layers: list[int], with_class: bool) -> list[tuple[Tensor, Tensor | None]]:
    """The same of each inner layer."""
    wish = {"return_prefix_tokens": True} if with_class else {}  # convolutional models have no such argument
    found = backbone.forward_intermediates(images, indices=layers, norm=True, intermediates_only=True, **wish)
    return [(field, prefix[:, 0]) for field, prefix in found] if with_class else [(field, None) for field in found]


def _pool(field: Tensor, class_token: Tensor | None, pooling: str) -> Tensor:
    """Field (B, C, h, w) and class token (B, C) -> (B, C), or (B, 2 C) of both."""
    if pooling == "max":
        return field.amax(dim=(2, 3))
    mean = field.mean(dim=(2, 3))
    if class_token is None or pooling == "mean":
        return mean
    return class_token if pooling == "class" else torch.cat([class_token, mean], dim=1)
