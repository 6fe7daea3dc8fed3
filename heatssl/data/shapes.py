"""The embedded data set: labelled scenes with exact object masks, generated and never stored.

Each scene holds one object of ten shape classes, textured, lit, coloured, turned and placed at random,
over a textured background cluttered with distractors. The object is always clearly brighter than both, and
covers the same share of the image whatever its class: colour and mean tell nothing of the class, and single
pixels little. Shape does.
"""

import logging
import os
import time
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heatssl.data.image_data import Split
from heatssl.data.shapes_geometry import CLASSES
from heatssl.data.shapes_render import Scenes, render

DEFAULT_SIZE = {"train": 8000, "val": 2000}
_STREAM = {"train": 0x5EED, "val": 0x7E57}
_CHUNK = 80  # images painted at once: their arrays fit the processor's cache
_THREADS = min(4, os.cpu_count() or 1)

log = logging.getLogger(__name__)


class Shapes:
    """Generated scenes, class-balanced; image i depends on the split, the image size and i alone.

    Args:
        split: train and val use random streams that share nothing.
        image_size: side in pixels.
        size: number of images; None: 8,000 for train and 2,000 for val.
    """

    def __init__(self, split: Split, image_size: int = 64, size: int | None = None) -> None:
        self.split = split
        self.image_size = image_size
        self.size = DEFAULT_SIZE[split] if size is None else size

    @property
    def classes(self) -> list[str]:
        """Names of the ten shapes."""
        return CLASSES

    @cached_property
    def labels(self) -> list[int]:
        """The label of every image: they take turns."""
        return [i % len(CLASSES) for i in range(self.size)]

    def __len__(self) -> int:
        return self.size

    def name(self, i: int) -> str:
        """For example ``val/00007 ring``."""
        return f"{self.split}/{i:05d} {CLASSES[i % len(CLASSES)]}"

    def version(self, i: int) -> str:
        """Its name: at any image size it is the same scene, which the code that paints decides."""
        return self.name(i)

    def load(self, i: int) -> Image.Image:
        """The scene, RGB."""
        return Image.fromarray(self._scenes.images[i])

    def mask(self, i: int) -> NDArray[np.bool_]:
        """Where the object is, (S, S), exact."""
        return self._scenes.masks[i]

    def paint_all(self) -> None:
        """Generate everything now: workers forked later share the pictures instead of painting them again."""
        self._scenes  # noqa: B018

    @property
    def _scenes(self) -> Scenes:
        return _paint_split(self.split, self.image_size, self.size)


@lru_cache(maxsize=4)
def _paint_split(split: Split, image_size: int, size: int) -> Scenes:
    started = time.monotonic()

    def paint(first: int) -> Scenes:
        return render(_STREAM[split], np.arange(first, min(first + _CHUNK, size)), image_size)

    with ThreadPoolExecutor(_THREADS) as pool:  # numpy lets other threads run while it computes
        chunks = list(pool.map(paint, range(0, size, _CHUNK)))
    scenes = Scenes(*(np.concatenate(parts) for parts in zip(*chunks, strict=True)))
    seconds = time.monotonic() - started
    if seconds > 2:
        log.info("painted %d scenes of %s in %.1f s", size, split, seconds)
    return scenes
