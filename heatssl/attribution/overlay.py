"""A heatmap over its image, as a picture with a scale."""

from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

BRIGHTEST = 0.995  # quantile of a map that gets the brightest colour: one hot pixel must not darken the rest
OPACITY = 0.65  # of the colour map over the greyed image, the same everywhere: a colour always means one value
PAPER, INK = "white", "black"


def picture_of(raw: NDArray[np.float32], image: NDArray[np.uint8] | None, *, size: int) -> Image.Image:
    """The magnitude of a raw map (h, w) over its image, or alone; see :func:`overlay`."""
    magnitude = np.abs(raw)
    largest = float(np.quantile(magnitude, BRIGHTEST)) or float(magnitude.max()) or 1.0
    return overlay(image, magnitude / largest, size=size, largest=largest)


def overlay(
    image: NDArray[np.uint8] | None,
    heat: NDArray[np.floating],
    *,
    size: int = 256,
    largest: float = 1.0,
    colour_map: Literal["inferno", "viridis"] = "inferno",
) -> Image.Image:
    """The image in grey, coloured by the heatmap, with a colour bar at its right.

    Args:
        image: (S, S, 3) uint8, RGB; None: the heat alone, where the image must not be shown.
        heat: (h, w) in [0, 1], of any resolution; values outside are cut.
        size: pixels of the picture's side, colour bar aside.
        largest: what heat 1 stands for, written at the top of the bar; its bottom is 0.
        colour_map: perceptually uniform.

    Returns:
        RGB picture, ``size`` high and about a quarter wider.
    """
    smooth = Image.fromarray(np.clip(heat, 0, 1).astype(np.float32)).resize((size, size), Image.Resampling.BILINEAR)
    shown = _coloured(np.asarray(smooth), colour_map)
    if image is not None:
        grey = Image.fromarray(image).convert("L").resize((size, size), Image.Resampling.BICUBIC).convert("RGB")
        shown = Image.blend(grey, shown, OPACITY)

    font = ImageFont.load_default(size=max(9, size // 20))
    label = f"{largest:.2g}"
    gap, bar = max(4, size // 32), max(8, size // 20)
    text = max(int(font.getlength(label)), int(font.getlength("0")))
    picture = Image.new("RGB", (size + gap + bar + gap // 2 + text + gap // 2, size), PAPER)
    picture.paste(shown, (0, 0))
    ramp = np.repeat(np.linspace(1, 0, size - 2 * gap)[:, None], bar, axis=1)
    picture.paste(_coloured(ramp, colour_map), (size + gap, gap))
    draw = ImageDraw.Draw(picture)
    beside = size + gap + bar + gap // 2
    draw.text((beside, gap), label, fill=INK, font=font, anchor="lt")
    draw.text((beside, size - gap), "0", fill=INK, font=font, anchor="lb")
    return picture


def _coloured(values: NDArray[np.floating], colour_map: str) -> Image.Image:
    """Values (h, w) in [0, 1] -> picture."""
    from matplotlib import colormaps  # late: only writing pictures needs it

    return Image.fromarray(np.ascontiguousarray(colormaps[colour_map](values, bytes=True)[..., :3]))
