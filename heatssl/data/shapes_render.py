"""Painting the scenes of ``shapes``: background, clutter, shadow, object, from uniform random numbers.

Every number of image i comes from one generator seeded by (stream, i), and no number depends on the
label, so that only the silhouette tells the class. Images are painted in chunks, one numpy expression
for the whole chunk.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from heatssl.data.shapes_geometry import CLASSES, Array, signed_distance

DISTRACTORS = 5
_DRAWS = 768  # random numbers kept for one image; _Draws raises when a scene asks for more
_DARKEST, _LIGHTEST = 0.14, 0.86
_TINTS = np.array([[0.8, -0.4, -0.4], [0.0, 0.7, -0.7]], dtype=np.float32)  # a plane of constant brightness


class _Draws:
    """Uniform random numbers of n images, handed out in order."""

    def __init__(self, stream: int, indices: NDArray[np.int64]) -> None:
        self.numbers = np.stack(
            [np.random.default_rng((stream, int(i))).random(_DRAWS, dtype=np.float32) for i in indices]
        )
        self.used = 0

    def __call__(self, low: float, high: float, *shape: int) -> Array:
        """Uniform in [low, high), shape (n, *shape)."""
        count = int(np.prod(shape))
        taken = self.numbers[:, self.used : self.used + count]
        self.used += count
        return (low + (high - low) * taken.reshape(len(taken), *shape)).astype(np.float32)

    def plane(self, low: float, high: float) -> Array:
        """One number per image, shaped (n, 1, 1) to meet coordinates (S, S)."""
        return self(low, high, 1, 1)

    def choice(self, options: int) -> NDArray[np.int64]:
        """One of ``options`` per image, shape (n, 1, 1)."""
        return np.minimum(self(0, options, 1, 1).astype(np.int64), options - 1)


class Scenes(NamedTuple):
    """``images``: uint8 (n, S, S, 3); ``masks``: bool (n, S, S), True where the object is."""

    images: NDArray[np.uint8]
    masks: NDArray[np.bool_]


def render(stream: int, indices: NDArray[np.int64], size: int) -> Scenes:
    """Paint the scenes with these indices; image i shows class ``i % 10``.

    Args:
        stream: seed of the split.
        indices: which images, (n,).
        size: side in pixels.
    """
    draws = _Draws(stream, indices)
    axis = ((np.arange(size, dtype=np.float32) + 0.5) / size).astype(np.float32)
    x, y = axis[None, None, :], axis[None, :, None]

    light = draws.plane(0, 2 * np.pi)
    light_x, light_y = np.cos(light), np.sin(light)
    bright = draws.plane(0, 0.35)
    background = _brightness(bright)
    foreground = _brightness(bright + draws.plane(0.4, 0.6))  # always the brighter one

    canvas = _surface(draws, x, y, background)
    for _ in range(DISTRACTORS):
        _add_distractor(draws, canvas, bright)
    canvas *= (1 + draws.plane(0.05, 0.25) * ((x - 0.5) * light_x + (y - 0.5) * light_y))[:, None]

    distance = _object(draws, x, y, np.asarray(indices) % len(CLASSES))
    outward_y, outward_x = np.gradient(distance, 1 / size, axis=(1, 2))
    shadow = distance + 0.05 * (outward_x * light_x + outward_y * light_y)  # moved away from the light
    canvas *= (1 - draws.plane(0.1, 0.3) / (1 + np.exp(shadow * 60)))[:, None]

    surface = _surface(draws, x, y, foreground)
    bevel = np.clip(1 + distance * 22, 0, 1) * draws.plane(0.05, 0.3)  # the rim alone turns to the light
    slope = draws.plane(0.1, 0.4) * ((x - 0.5) * light_x + (y - 0.5) * light_y)
    surface *= (1 + slope + bevel * (outward_x * light_x + outward_y * light_y))[:, None]

    cover = _cover(distance, size)
    _paint(canvas, cover, surface)
    images = (np.clip(canvas, 0, 1) * 255 + 0.5).astype(np.uint8)
    return Scenes(np.ascontiguousarray(images.transpose(0, 2, 3, 1)), distance < 0)


def _brightness(share: Array) -> Array:
    """Brightness between the darkest and the lightest, from a share in [0, 1]."""
    return _DARKEST + (_LIGHTEST - _DARKEST) * share


def _colour(draws: _Draws, brightness: Array, strongest: float) -> Array:
    """A random colour (n, 3, 1, 1) of the given mean brightness."""
    hue, strength = draws(0, 2 * np.pi, 1), draws(0.05, strongest, 1)
    tint = np.concatenate([np.cos(hue), np.sin(hue)], axis=1) * strength @ _TINTS
    return brightness[:, None] + tint[:, :, None, None]


def _surface(draws: _Draws, x: Array, y: Array, brightness: Array) -> Array:
    """A textured plane (n, 3, S, S): stripes, checks, dots or clouds between two colours."""
    contrast = draws.plane(-0.05, 0.05)
    first = _colour(draws, brightness + contrast, 0.2)
    second = _colour(draws, brightness - contrast, 0.2)
    angle, frequency = draws.plane(0, np.pi), draws.plane(3, 10) * 2 * np.pi
    cos, sin = np.cos(angle) * frequency, np.sin(angle) * frequency
    clouds = _clouds(draws, x.shape[2], 7)
    along = np.sin(x * cos + y * sin + draws.plane(0, 2 * np.pi) + clouds * draws.plane(0, 3))
    across = np.sin(y * cos - x * sin + draws.plane(0, 2 * np.pi))
    kind = draws.choice(4)
    wave = np.where(kind == 0, along, np.where(kind == 1, along * across * 2, along + across - 0.8))
    wave = np.where(kind == 3, _clouds(draws, x.shape[2], 12) * 2, wave)
    mixture = np.clip(0.5 + wave * draws.plane(0.4, 1.5), 0, 1)[:, None]
    return first + (second - first) * mixture


def _clouds(draws: _Draws, size: int, cells: int) -> Array:
    """Smooth noise (n, S, S) in [-1, 1]: random values on a grid of cells, cosine-interpolated."""
    values = draws(-1, 1, cells + 1, cells + 1)
    position = np.linspace(0, cells, size, endpoint=False, dtype=np.float32)
    near = np.clip(1 - np.abs(position[:, None] - np.arange(cells + 1, dtype=np.float32)), 0, 1)
    weights = 0.5 - 0.5 * np.cos(near * np.float32(np.pi))
    return weights @ values @ weights.T


def _add_distractor(draws: _Draws, canvas: Array, bright: Array) -> None:
    """Paint a rod, an ellipse or a slanted bar: thin or small things, none of the classes."""
    centre_x, centre_y, angle = draws.plane(0, 1), draws.plane(0, 1), draws.plane(0, 2 * np.pi)
    kind = draws.choice(3)
    long = np.where(kind == 0, draws.plane(0.08, 0.24), draws.plane(0.06, 0.13))
    thin = np.where(kind == 0, draws.plane(0.008, 0.02), long * draws.plane(0.3, 0.55))
    brightness = _brightness(np.maximum(bright + draws.plane(-0.14, 0.14), 0))  # near the background's
    colour = _colour(draws, brightness, 0.35)
    opacity = draws.plane(0.6, 1.0)

    # Only the quarter of the picture around the centre is looked at: nothing reaches out of it.
    size = canvas.shape[2]
    rows, window_y = _window(centre_y, size)
    columns, window_x = _window(centre_x, size)
    dx, dy = window_x[:, None, :] - centre_x, window_y[:, :, None] - centre_y
    cos, sin = np.cos(angle), np.sin(angle)
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    slanted = along + across * np.where(kind == 0, np.float32(0), np.float32(0.8))
    bar = np.maximum(np.abs(slanted) - long, np.abs(across) - thin)
    stretched = across * (long / thin)
    ellipse = (np.sqrt(along * along + stretched * stretched) - long) * (thin / long)
    cover = _cover(np.where(kind == 1, ellipse, bar), size) * opacity

    half = rows.shape[1]
    for picture, row, column, share, paint in zip(canvas, rows[:, 0], columns[:, 0], cover, colour, strict=True):
        part = picture[:, row : row + half, column : column + half]
        part += (paint - part) * share  # a loop over slices: gathering them all at once is slower


def _window(centre: Array, size: int) -> tuple[NDArray[np.int64], Array]:
    """Half of an axis around the centres (n, 1, 1): pixel numbers and coordinates, both (n, S / 2)."""
    half = size // 2
    first = np.clip(np.rint(centre[:, :, 0] * size - half / 2).astype(np.int64), 0, size - half)
    pixels = first + np.arange(half)
    return pixels, ((pixels + 0.5) / size).astype(np.float32)


def _object(draws: _Draws, x: Array, y: Array, labels: NDArray[np.int64]) -> Array:
    """Signed distance (n, S, S), in sides of the image, to the object; it lies fully inside the image."""
    side = draws.plane(0.26, 0.38)  # root of the area; none reaches over 0.95 sides
    room = 0.5 - 0.95 * side
    centre_x, centre_y = 0.5 + room * draws.plane(-1, 1), 0.5 + room * draws.plane(-1, 1)
    angle = draws.plane(-0.6, 0.6)  # radians: 34 degrees either way
    cos, sin = np.cos(angle) / side, np.sin(angle) / side
    dx, dy = x - centre_x, y - centre_y
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    distance = np.empty_like(along)
    for label in np.unique(labels):
        chosen = labels == label
        distance[chosen] = signed_distance(CLASSES[label], along[chosen], across[chosen])
    return distance * side


def _cover(distance: Array, size: int) -> Array:
    """The share of every pixel that lies inside, from its distance to the outline."""
    return np.clip(0.5 - distance * size, 0, 1)


def _paint(canvas: Array, cover: Array, surface: Array) -> None:
    """Lay a surface over the canvas (n, 3, S, S), in place."""
    canvas += (surface - canvas) * cover[:, None]
