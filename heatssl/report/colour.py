"""Perceptual colour maps without matplotlib: 33 anchors each, linear between them."""

from typing import Literal

import numpy as np

# Every eighth colour of matplotlib's maps (CC0); the interpolation stays within 2/255 of the originals.
ANCHORS = {
    "inferno": (
        "000004 040312 0b0724 150b37 210c4a 2f0a5b 3d0965 4a0c6b 57106e 64156e 71196e 7d1e6d 8a226a "
        "972766 a32c61 b0315b bc3754 c63d4d d04545 da4e3c e35933 eb6429 f1711f f67e14 f98c0a fb9b06 "
        "fcaa0f fbba1f f9c932 f5d949 f2e865 f3f586 fcffa4"
    ),
    "viridis": (
        "440154 470d60 48186a 482374 472d7b 453781 424086 3e4989 3b528b 375b8d 33638d 2f6b8e 2c728e "
        "297a8e 26828e 23898e 21918c 1f978b 1f9f88 21a685 27ad81 31b57b 3dbc74 4cc26c 5cc863 6ece58 "
        "81d34d 95d840 aadc32 c0df25 d5e21a eae51a fde725"
    ),
}
ColourMap = Literal["inferno", "viridis"]


def lookup_table(name: ColourMap) -> np.ndarray:
    """The map as (256, 3) uint8, dark to bright."""
    anchors = np.array([list(bytes.fromhex(colour)) for colour in ANCHORS[name].split()], dtype=float)
    places = np.linspace(0, 255, len(anchors))
    channels = [np.interp(np.arange(256), places, anchors[:, channel]) for channel in range(3)]
    table: np.ndarray = np.rint(np.stack(channels, axis=1)).astype(np.uint8)
    return table


def colourise(values: np.ndarray, low: float, high: float, name: ColourMap = "inferno") -> np.ndarray:
    """Values (H, W) -> colours (H, W, 3) uint8; ``low`` is the darkest, ``high`` the brightest.

    Values outside the range take its nearest end; positions that are not finite turn mid grey.
    """
    span = max(high - low, 1e-12)
    finite = np.isfinite(values)
    index = np.clip((np.where(finite, values, low) - low) / span, 0, 1) * 255
    colours: np.ndarray = lookup_table(name)[np.rint(index).astype(int)]
    colours[~finite] = 128
    return colours
