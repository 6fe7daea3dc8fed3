"""If these fail, some of a user's files turn black, white, sideways or bad without reason."""

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatssl.data.decode import decode


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("P", "GIF"),
    ],
)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(mode: str, kind: str) -> None:
    colour = Image.new("RGB", (16, 16), (200, 200, 200) if mode != "1" else (255, 255, 255))
    image = decode(encoded(colour.quantize(4) if mode == "P" else colour.convert(mode), kind))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(colour)).max() < 6


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    shown = np.asarray(decode(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(shown.astype(int) - ramp // 257).max() <= 1


def test_transparent_pixels_are_white() -> None:
    assert np.asarray(decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))).min() == 255


def test_a_rotated_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    assert decode(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error_and_not_half_grey(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    with pytest.raises(OSError, match="truncated"):
        decode(data[: len(data) // 2])
