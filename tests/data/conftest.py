from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture
def write_images() -> Callable[..., Path]:
    """Writes small random JPEGs at the given paths below a folder."""

    def write(root: Path, *paths: str, size: tuple[int, int] = (20, 12)) -> Path:
        for number, path in enumerate(paths):
            target = root / path
            target.parent.mkdir(parents=True, exist_ok=True)
            pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(target)
        return root

    return write
