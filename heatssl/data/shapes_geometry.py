"""The ten silhouettes as signed distances: negative inside, zero on the outline, positive outside.

A signed distance gives an exact mask (its sign), an antialiased edge (its value in pixels) and the
direction of the outline (its gradient) from one array. Formulas for heart and star: Inigo Quilez,
"2D distance functions", https://iquilezles.org/articles/distfunctions2d/.
"""

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.floating[Any]]  # float32 throughout


def _length(x: Array, y: Array) -> Array:
    return np.sqrt(x * x + y * y)


def _disc(x: Array, y: Array) -> Array:
    return _length(x, y) - 1


def _square(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x), np.abs(y)) - 1


def _triangle(x: Array, y: Array) -> Array:
    return np.maximum(np.abs(x) * (math.sqrt(3) / 2) + y / 2, -y) - 0.5


def _star(x: Array, y: Array) -> Array:
    tip_ratio = 0.45
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x = np.abs(x)
    for normal_x, normal_y in ((cos, -sin), (-cos, -sin)):  # fold all five arms onto the one that points up
        beyond = 2 * np.maximum(normal_x * x + normal_y * y, 0)
        x, y = x - beyond * normal_x, y - beyond * normal_y
    x, y = np.abs(x), y - 1
    edge_x, edge_y = tip_ratio * sin, tip_ratio * cos - 1
    along = np.clip((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2), 0, 1)
    return _length(x - edge_x * along, y - edge_y * along) * np.sign(y * edge_x - x * edge_y)


def _cross(x: Array, y: Array) -> Array:
    x, y = np.abs(x), np.abs(y)
    return np.maximum(np.maximum(x, y) - 1, np.minimum(x, y) - 0.32)


def _ring(x: Array, y: Array) -> Array:
    return np.abs(_length(x, y) - 0.75) - 0.25


def _crescent(x: Array, y: Array) -> Array:
    return np.maximum(_length(x, y) - 1, 0.7 - _length(x - 0.5, y))


def _heart(x: Array, y: Array) -> Array:
    x = np.abs(x)
    total = x + y
    lobe = _length(x - 0.25, y - 0.75) - math.sqrt(2) / 4
    half = np.maximum(total, 0) / 2
    flank = np.sqrt(np.minimum(x * x + (y - 1) ** 2, (x - half) ** 2 + (y - half) ** 2)) * np.sign(x - y)
    return np.where(total > 1, lobe, flank)


def _arrow(x: Array, y: Array) -> Array:
    x = np.abs(x)
    head = np.maximum((x + y - 1) * math.sqrt(0.5), -y)
    shaft = np.maximum(x - 0.32, np.abs(y + 0.45) - 0.55)
    return np.minimum(head, shaft)


def _flower(x: Array, y: Array) -> Array:
    nearest = x * x + y * y  # the middle is a disc like the petals
    for petal in range(5):
        dx, dy = x - 0.62 * math.cos(petal * math.tau / 5), y - 0.62 * math.sin(petal * math.tau / 5)
        nearest = np.minimum(nearest, dx * dx + dy * dy)
    return np.sqrt(nearest) - 0.36


_OUTLINES: dict[str, Callable[[Array, Array], Array]] = {
    "arrow": _arrow,
    "crescent": _crescent,
    "cross": _cross,
    "disc": _disc,
    "flower": _flower,
    "heart": _heart,
    "ring": _ring,
    "square": _square,
    "star": _star,
    "triangle": _triangle,
}
CLASSES = list(_OUTLINES)


@cache
def _frame(shape: str) -> tuple[float, float, float]:
    """Square root of the area, and the centroid, of a silhouette in its own units."""
    axis = np.linspace(-1.5, 1.5, 601, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = _OUTLINES[shape](x, y) < 0
    side = math.sqrt(inside.sum()) * float(axis[1] - axis[0])
    return side, float(x[inside].mean()), float(y[inside].mean())


def signed_distance(shape: str, x: Array, y: Array) -> Array:
    """Signed distance to a silhouette of area 1 whose centroid is the origin.

    All classes have the same area and the same centre, so that neither the number of painted pixels nor
    their mean position tells a class.

    Args:
        shape: one of ``CLASSES``.
        x: coordinates, float32, any shape.
        y: the same.

    Returns:
        Distance in the units of x and y; exact near the outline, elsewhere at least of the right sign.
    """
    side, middle_x, middle_y = _frame(shape)
    return _OUTLINES[shape](x * side + middle_x, y * side + middle_y) / side
