"""Rotary positions on the patch grid, and what stretches them beyond the grid of training.

RoPE turns pairs of channels of queries and keys by angles proportional to their position, so that a score depends
on the offset alone. In two dimensions (axial) the first half of the channels turns with the row, the second with the
column. Beyond the offsets met in training the fast turns are noise; each of these keeps offsets familiar:

* ``interpolated``: a patch is a step of 1 / ``scale`` (position interpolation, arXiv 2306.15595), as in the table of a
  ViT that meets a larger image: what lies a quarter of the image apart in a larger image of the same thing does so
  still. Without a scale each axis follows the grid that is met. The others keep offsets in patches;
* ``ntk``: slower turns, the slowest by ``scale`` and the fastest hardly at all: base * scale^(m / (m - 1)) for m
  frequencies; ``ntk_mixed``: theta_j is divided by exp(a j^0.625), a m^0.625 = log scale, j = 1 ... m
  (kexue.fm 9706; both as fixed changes of the frequencies);
* ``rerope``: offsets beyond ``window`` count as ``window`` (kexue.fm 9708), on each axis by itself;
* ``leaky_rerope``: beyond it they grow on, by 1 / ``scale`` a patch. A scale below 1 is the inverse (kexue.fm 9728):
  train so, with steps above one outside the window, and evaluate with ``rope``.

With a scale of 1, and without one on the grid of training, all but ``rerope`` are ``rope``.

Nothing here has weights: :func:`heatssl.backbones.set_positions` changes a trained model.
"""

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.ops.surroundings import must_be_plain

Kind = Literal["rope", "interpolated", "ntk", "ntk_mixed", "rerope", "leaky_rerope"]
_MIXED_EXPONENT = 0.625  # b of kexue.fm 9706, between interpolated (0) and ntk (1)


@dataclass(frozen=True)
class PositionSettings:
    """How offsets become angles.

    Attributes:
        kind: see the module's text.
        base: of the frequencies base^(-j / m), radians per patch, j = 0 ... m - 1.
        scale: interpolated, ntk, ntk_mixed: sides of the new grid over those of training. leaky_rerope: patches outside
            the window that count as one. None: interpolated follows each grid by itself, of the others it is 1.
        window: rerope, leaky_rerope: patches along an axis.

    Raises:
        ValueError: on an unknown kind, or numbers that are not positive and finite.
    """

    kind: Kind = "rope"
    base: float = 100.0
    scale: float | None = None
    window: float = 4.0

    def __post_init__(self) -> None:
        check_choice("positions", self.kind, get_args(Kind))
        for name in ("base", "scale", "window"):
            number = getattr(self, name)
            if number is not None and not (math.isfinite(number) and number > 0):
                raise ValueError(f"{name} of positions must be positive and finite, not {number}")


class Rotation(NamedTuple):
    """What a forward pass needs to know of its tokens' places; computed once, used by every layer.

    Attributes:
        turns: cosine and sine of the angle of each pair of channels, (T, ..., n, s / 2, 2). T is 1; with a window 4:
            inside it, queries after and queries before their key outside it, keys outside it.
        beyond: (2, ..., n, n) by axis, 1 where a query lies more than the window after its key, -1 where before, 0
            inside; without a window empty.
    """

    turns: Tensor
    beyond: Tensor


class RotaryPositions(nn.Module):
    """Places of tokens -> :class:`Rotation`, for queries and keys of one width.

    Args:
        width: s of queries and keys of one head, a multiple of 4.
        settings: see :class:`PositionSettings`.
        grid: rows and columns of patches at training.

    Raises:
        ValueError: on another width.
    """

    frequencies: Tensor

    def __init__(self, width: int, settings: PositionSettings, grid: tuple[int, int]) -> None:
        super().__init__()
        if width < 4 or width % 4:
            raise ValueError(f"axial rotary positions need a width that 4 divides, not {width}")
        self.width = width
        self.rows, self.columns = grid
        self.register_buffer("frequencies", torch.empty(width // 4), persistent=False)
        self.change(settings)

    def change(self, settings: PositionSettings) -> None:
        """Use other settings from now on."""
        self.settings = settings
        self.windowed = settings.kind in ("rerope", "leaky_rerope")
        self.window = settings.window
        self.follows_grid = settings.kind == "interpolated" and settings.scale is None
        self.step_outside = 0.0 if settings.kind == "rerope" else 1 / (settings.scale or 1.0)
        self.frequencies = frequencies(self.width // 4, settings).to(self.frequencies)

    @torch.jit.unused
    def init_non_persistent_buffers(self) -> None:
        """Called by timm once weights were loaded into a model of the meta device."""
        self.change(self.settings)

    def forward(self, places: Tensor, grid: tuple[int, int]) -> Rotation:
        """Rows and columns of tokens, (..., n, 2), real numbers in patches of a grid of so many -> their rotation."""
        if self.follows_grid:
            places = torch.stack(
                [places[..., 0] * (self.rows / grid[0]), places[..., 1] * (self.columns / grid[1])], dim=-1
            )
        versions = [places]
        axes = torch.stack([places[..., 0], places[..., 1]])
        beyond = axes[..., :0, None]
        if self.windowed:
            # An offset d > w counts as w + (d - w) g = d g + w (1 - g): keys at p g, queries at p g +- w (1 - g).
            outside, shift = places * self.step_outside, self.window * (1 - self.step_outside)
            versions += [outside + shift, outside - shift, outside]
            offset = axes[..., :, None] - axes[..., None, :]
            beyond = (offset > self.window).to(places.dtype) - (offset < -self.window).to(places.dtype)
        angles = (torch.stack(versions)[..., None] * self.frequencies).flatten(-2)
        return Rotation(torch.stack([angles.cos(), angles.sin()], dim=-1), beyond)

    def extra_repr(self) -> str:
        return f"{self.width}, {self.settings}, grid={(self.rows, self.columns)}"


def frequencies(number: int, settings: PositionSettings) -> Tensor:
    """Radians per patch, (number,), the fastest first."""
    index = torch.arange(number, dtype=torch.float32)
    base, scale = settings.base, settings.scale or 1.0
    if settings.kind == "ntk" and number > 1:
        base *= scale ** (number / (number - 1))
    turns = base ** (-index / number)
    if settings.kind == "interpolated":
        turns = turns / scale
    if settings.kind == "ntk_mixed":
        turns = turns / torch.exp(math.log(scale) * ((index + 1) / number) ** _MIXED_EXPONENT)
    return turns


def scaled(rotation: Rotation, factor: Tensor) -> Rotation:
    """One that multiplies by a factor as it turns, broadcasting with (..., n, 1): no pass of its own."""
    return Rotation(rotation.turns * factor.unsqueeze(-1), rotation.beyond)


def turn(x: Tensor, rotation: Rotation) -> Tensor:
    """Queries or keys (..., n, s) as they are turned without a window, and inside one."""
    return rotate(x, rotation.turns[0])


def rotate(x: Tensor, turns: Tensor) -> Tensor:
    """Turn the pairs of channels (0, 1), (2, 3), ... of x (..., n, s): (a, b) -> (a cos - b sin, b cos + a sin).

    With the turns (..., n, s / 2, 2) as complex numbers that is one product of float32, a third of what it takes
    written out. Graphs and exports know no complex numbers.
    """
    if not torch.jit.is_scripting() and not must_be_plain():
        return _rotate_complex(x, turns)
    cos, sin = turns.to(x.dtype).unbind(-1)
    a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=-1).flatten(-2)


@torch.jit.unused
def _rotate_complex(x: Tensor, turns: Tensor) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = torch.view_as_complex(x.to(wide).unflatten(-1, (-1, 2)))
    turned = pairs * torch.view_as_complex(turns.to(wide))
    return torch.view_as_real(turned).flatten(-2).to(x.dtype)


def scores_with_window(query: Tensor, key: Tensor, of_queries: Rotation, of_keys: Rotation) -> Tensor:
    """Dot products of rotated queries and keys, each (..., n, s) -> (..., n, n), by the offset of each pair.

    The leading axes of the rotations must broadcast with those of queries and keys: see :func:`for_heads`.
    """
    by_axis: list[Tensor] = []
    for axis in range(2):
        q, k = query.chunk(2, -1)[axis], key.chunk(2, -1)[axis]
        of_q, of_k = of_queries.turns.chunk(2, -2)[axis], of_keys.turns.chunk(2, -2)[axis]
        far = rotate(k, of_k[3]).transpose(-2, -1)
        after, before = rotate(q, of_q[1]) @ far, rotate(q, of_q[2]) @ far
        near = rotate(q, of_q[0]) @ rotate(k, of_k[0]).transpose(-2, -1)
        beyond = of_keys.beyond[axis]
        by_axis.append(torch.where(beyond > 0, after, torch.where(beyond < 0, before, near)))
    return by_axis[0] + by_axis[1]
