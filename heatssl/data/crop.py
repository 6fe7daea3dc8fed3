"""One decoded image -> one square uint8 tensor: cropped, and shrunk with antialiasing."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2 import functional as F

from heatssl.errors import UserError

_RATIO = math.log(4 / 3)  # widest and tallest crop, as a logarithm of width over height


def check_crop_scale(scale: Sequence[float], name: str = "data.crop_scale") -> None:
    """Refuse what is no range of fractions.

    Raises:
        UserError: naming the setting.
    """
    if len(scale) != 2 or not 0 < scale[0] <= scale[1] <= 1:
        fix = "use two fractions, the smaller first, such as [0.35,1.0]"
        raise UserError(f"{name}={scale} is no range of areas: {fix}")


def random_resized_crop(image: Image.Image, size: int, scale: Sequence[float], random: np.random.Generator) -> Tensor:
    """A random part of the image, scaled to a square: the crop of Inception (arXiv:1409.4842, section 6).

    The same as torchvision's RandomResizedCrop, with the random numbers of the caller.

    Args:
        image: RGB.
        size: side S of the result.
        scale: smallest and largest area of the crop, as fractions of the image.
        random: where the crop comes from.

    Returns:
        uint8 (3, S, S).
    """
    width, height = image.size
    for _ in range(10):
        area = random.uniform(scale[0], scale[1]) * width * height
        ratio = math.exp(random.uniform(-_RATIO, _RATIO))
        crop_width, crop_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < crop_width <= width and 0 < crop_height <= height:
            left = int(random.integers(width - crop_width + 1))
            top = int(random.integers(height - crop_height + 1))
            return _resized(image, left, top, crop_width, crop_height, size)
    # No crop fits, the image is too slim: the largest allowed one from its middle.
    crop_width = max(1, min(width, round(height * math.exp(_RATIO))))
    crop_height = max(1, min(height, round(width * math.exp(_RATIO))))
    left, top = (width - crop_width) // 2, (height - crop_height) // 2
    return _resized(image, left, top, crop_width, crop_height, size)


def centre_crop(image: Image.Image, size: int) -> Tensor:
    """The largest square in the middle, scaled to uint8 (3, S, S); an image that is S x S stays as it is."""
    width, height = image.size
    side = min(width, height)
    return _resized(image, (width - side) // 2, (height - side) // 2, side, side, size)


def centre_crop_mask(mask: NDArray[np.uint8], size: int) -> Tensor:
    """The same part of a mask (H, W) as :func:`centre_crop` takes of its image: uint8 (S, S), the nearest values."""
    height, width = mask.shape
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    square = torch.from_numpy(np.ascontiguousarray(mask[top : top + side, left : left + side]))[None]
    return F.resize(square, [size, size], F.InterpolationMode.NEAREST_EXACT)[0]


def _resized(image: Image.Image, left: int, top: int, width: int, height: int, size: int) -> Tensor:
    # Pillow crops before anything is copied into a tensor: large photographs stay cheap.
    pixels = F.pil_to_tensor(image.crop((left, top, left + width, top + height)))
    if (width, height) == (size, size):
        return pixels
    return F.resize(pixels, [size, size], antialias=True)
