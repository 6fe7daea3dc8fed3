"""features.npz: final feature maps of the explained images as colours, and small enough to be compared in a page."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from heatssl.attribution.components import Components, principal_components
from heatssl.backbones import feature_map
from heatssl.files import write_atomically

COLOURS = 3  # components that are shown as red, green and blue
COMPARED = 32  # components that similarities are computed from


@torch.no_grad()
def write_features(
    path: Path, backbone: nn.Module, images: Tensor, names: list[str], chunk: int, *, source: str = "", step: int = 0
) -> None:
    """Write what the gallery shows of the final maps (h, w) of normalised images (N, 3, S, S).

    Components are those of all positions of all images together, so that colours mean the same everywhere.

    Arrays: ``image`` (N,) names; ``colours`` (N, h, w, 3) float32, see :func:`colours`, and ``colour_share`` (3,) of
    the variance; ``codes`` (N, h, w, D) int8, D at most 32: each position's own direction from the mean, along the
    first D components, its largest entry 127; ``code_share``, of the variance, that these D hold; ``source``
    and ``step`` of the weights, as they were given.
    """
    field = torch.cat([feature_map(backbone, part).float().cpu() for part in images.split(chunk)])
    components = principal_components(field, COMPARED)
    arrays: dict[str, Any] = {
        "image": np.array(names),
        "colours": colours(components, field),
        "colour_share": components.share[:COLOURS].numpy(),
        "codes": codes(components.coordinates(field)),
        "code_share": components.share.sum().numpy(),
        "source": np.array(source),
        "step": np.array(step),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def colours(components: Components, field: Tensor) -> np.ndarray:
    """A field (N, C, h, w) along the first three components, in deviations of each: (N, h, w, 3) float32."""
    deviation = components.variance[:COLOURS].sqrt()
    scaled = components.coordinates(field)[..., :COLOURS] / torch.where(deviation > 0, deviation, 1.0)
    padded: np.ndarray = torch.nn.functional.pad(scaled, (0, COLOURS - scaled.shape[-1])).float().numpy()
    return padded


def codes(coordinates: Tensor) -> np.ndarray:
    """Directions in 8 bits: (N, h, w, D) -> same, int8; cosines survive, lengths do not."""
    largest = coordinates.abs().amax(dim=-1, keepdim=True)
    small: np.ndarray = (127 * coordinates / torch.where(largest > 0, largest, 1.0)).round().to(torch.int8).numpy()
    return small
