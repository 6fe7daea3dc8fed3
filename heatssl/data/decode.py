"""Bytes of an image file -> RGB, as a viewer would show it."""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

_SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


def decode(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB, turned as its EXIF says, transparency over white.

    16-bit greys keep their range: Pillow's own conversion would clip everything over 255 to white.

    Raises:
        ValueError: on a pixel that is no number.
        Exception: whatever the decoder raises on a damaged file.
    """
    with _silent_about_notes():
        image: Image.Image = _open(data)
        image.load()
        is_tiff = image.format == "TIFF"
        image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image), is_tiff)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def shown_size(data: bytes) -> tuple[int, int]:
    """Width and height that :func:`decode` would give, without decoding, where the format tells."""
    with _silent_about_notes():
        image = _open(data)
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) in _SIDEWAYS
    width, height = image.size
    return (height, width) if turned else (width, height)


@contextmanager
def _silent_about_notes() -> Iterator[None]:
    """Without Pillow's warning of damaged EXIF data, of which the pixels know nothing."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Corrupt EXIF data")
        yield


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose own words name a memory address instead of the file
        raise UnidentifiedImageError("not an image, or of an unknown format") from error


def _to_8_bits(grey: NDArray[Any], is_tiff: bool) -> NDArray[np.uint8]:
    return (np.clip(grey / _white(grey, is_tiff), 0, 1) * 255).round().astype(np.uint8)


def _white(grey: NDArray[Any], is_tiff: bool) -> float:
    """TIFF alone stores floats and integers of 32 bits, and does not say what is white."""
    brightest = float(grey.max())
    if grey.dtype.kind == "f":
        if not np.isfinite(grey).all():
            raise ValueError("pixels that are no numbers (NaN or infinite)")
        return max(brightest, 1.0)
    return 255.0 if is_tiff and grey.dtype.itemsize > 2 and brightest <= 255 else 65535.0
