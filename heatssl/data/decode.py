"""Bytes of an image file -> RGB, as a viewer would show it."""

import io
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError


def decode(data: bytes) -> Image.Image:
    """Decode to 8-bit RGB, turned as its EXIF says, transparency over white.

    16-bit greys keep their range: Pillow's own conversion would clip everything over 255 to white.

    Raises:
        Exception: whatever the decoder raises on a damaged file.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:  # whose own words name a memory address instead of the file
        raise UnidentifiedImageError("not an image, or of an unknown format") from error
    image.load()
    image = ImageOps.exif_transpose(image)
    if image.mode == "RGB":
        return image
    if image.mode.startswith(("I", "F")):
        return Image.fromarray(_to_8_bits(np.asarray(image))).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")


def _to_8_bits(grey: NDArray[Any]) -> NDArray[np.uint8]:
    # TIFF alone stores floats, and does not say what is white: 1, or else the brightest pixel.
    white = max(float(grey.max()), 1.0) if grey.dtype.kind == "f" else 65535.0
    return (np.clip(grey / white, 0, 1) * 255).round().astype(np.uint8)
