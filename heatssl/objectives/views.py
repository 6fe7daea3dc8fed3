"""Random views of the images of a batch: crop, flip, colour, grey, blur, each image on its own (SimCLR, 2002.05709).

A step brings one crop of each image, made by the data workers from the original file; the views of a
joint-embedding objective are made here, on the device, from these very pixels, by a second crop. One decoded
image thus serves any number of views, and every objective trains on the same stream of data. The price: a view
shows at most what the first crop shows, and at the detail of ``data.image_size``. ``data.crop_scale`` near 1
leaves the views most room.

Stated by SimCLR's appendix A: the operations, their order, 80 % for the colour jitter, 20 % for grey, 50 % for
the blur, whose kernel is a tenth of the image wide with sigma from 0.1 to 2. Ours: where the pixels come from;
strengths of jitter that a setting scales together.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heatssl.colours import colour_changes
from heatssl.ops import full_precision


class ViewSettings(NamedTuple):
    """How views are drawn.

    Attributes:
        size: pixels of the square views.
        crop_scale: smallest and largest area of the crop, as fractions of the image.
        colour_jitter: strength s: brightness, contrast and saturation change by up to s, hue by up to s / 4,
            in 80 % of the images. 0.8 is SimCLR's for ImageNet.
        grey: probability of turning grey.
        blur: probability of a Gaussian blur.
    """

    size: int
    crop_scale: tuple[float, float]
    colour_jitter: float
    grey: float
    blur: float


def view_settings(
    size: int, crop_scale: Sequence[float], colour_jitter: float, grey: float, blur: float
) -> ViewSettings:
    """Settings as users give them, checked.

    Raises:
        ValueError: on a crop scale that is no range of fractions, or a probability or strength out of range.
    """
    if len(crop_scale) != 2 or not 0 < crop_scale[0] <= crop_scale[1] <= 1:
        raise ValueError(f"crop scale {list(crop_scale)} is no range of areas: use two fractions, such as [0.2,1.0]")
    if not (0 <= grey <= 1 and 0 <= blur <= 1 and 0 <= colour_jitter <= 1):
        raise ValueError("colour_jitter, grey and blur are between 0 and 1")
    return ViewSettings(size, (crop_scale[0], crop_scale[1]), colour_jitter, grey, blur)


@torch.no_grad()
def random_view(images: Tensor, settings: ViewSettings, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """One new random view of each image.

    Random numbers come from torch's global generator alone: ``torch.manual_seed`` repeats a view.

    Args:
        images: (B, 3, S, S), normalised.
        settings: how to draw.
        mean: of the channels, as subtracted from the images: colours change in [0, 1].
        std: of the channels, likewise.

    Returns:
        (B, 3, size, size), normalised.
    """
    return _change(images, _operations(settings), mean, std)


@torch.no_grad()
def recolour(images: Tensor, settings: ViewSettings, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """:func:`random_view` without crop and flip: (B, 3, H, W) -> same, each image in other colours."""
    return _change(images, _colours(settings), mean, std)


def _change(images: Tensor, operations: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    centre, scale = (images.new_tensor(values).view(3, 1, 1) for values in (mean, std))
    with full_precision(images):  # kornia is not safe in half precision
        pixels = (images * scale + centre).float().clamp(0, 1)
        return (operations(pixels) - centre) / scale


@lru_cache(maxsize=8)
def _operations(settings: ViewSettings) -> nn.Sequential:
    import kornia.augmentation as K  # a slow import, and most objectives need none of it

    side = (settings.size, settings.size)
    # Resampling cuts all crops in one operation; slicing, the default, goes through them one by one.
    crop = K.RandomResizedCrop(side, scale=settings.crop_scale, cropping_mode="resample")
    return nn.Sequential(crop, K.RandomHorizontalFlip(), *_colours(settings))


@lru_cache(maxsize=8)
def _colours(settings: ViewSettings) -> nn.Sequential:
    import kornia.augmentation as K

    operations = colour_changes(settings.colour_jitter, settings.grey)
    if settings.blur > 0:
        kernel = max(3, settings.size // 10 // 2 * 2 + 1)  # odd
        operations.append(K.RandomGaussianBlur((kernel, kernel), (0.1, 2.0), p=settings.blur))
    return nn.Sequential(*operations)
