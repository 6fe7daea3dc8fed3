"""Attention at rotary positions, as every kind of block has it."""

from typing import NamedTuple

from torch import Tensor

from heatssl.backbones.normalisers import Weighting
from heatssl.backbones.positions import Rotation, rotate, scores
from heatssl.ops import attention, attention_weights


class Whereabouts(NamedTuple):
    """What a block is told of its tokens (B, n, d), besides what they say.

    Attributes:
        rotation: of their places; in chunk attention of the places in G chunks of m each.
        weighting: of as many keys as there are.
        keys: bool, broadcasting with (B, n, n), in chunks with (B, G, m, m): which keys each query has; None: all.
        valid: chunk attention: (B, n) bool, which tokens are there; None: all.
        number: chunk attention: how many these are, float32, broadcasting with (B, 1, 1).
        slots: chunk attention: (B or 1, n) long, the place g m + k of each token; None: tokens stand as they are.
        tiles: chunk attention: chunks down and across and rows and columns of each, where they are full; else None.
    """

    rotation: Rotation
    weighting: Weighting
    keys: Tensor | None
    valid: Tensor | None = None
    number: Tensor | None = None
    slots: Tensor | None = None
    tiles: tuple[int, int, int, int] | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, where: Whereabouts) -> Tensor:
    """Values (..., n, m) by queries and keys (..., n, s) -> (..., n, m).

    The leading axes of ``where`` must broadcast with theirs: see :func:`for_heads`. Positions with a window need three
    scores for each pair, and have no fused attention.
    """
    rotation, weighting = where.rotation, where.weighting
    if rotation.beyond.numel() == 0:
        cos, sin = rotation.cos[0], rotation.sin[0]
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        return attention(query, key, value, None, weighting.activation, weighting.factor, weighting.divisor, where.keys)
    return weights(query, key, where) @ value


def weights(query: Tensor, key: Tensor, where: Whereabouts) -> Tensor:
    """How much of each key every query takes in :func:`attend`: (..., n, s) each -> (..., n, n)."""
    weighting = where.weighting
    found = scores(query, key, where.rotation)
    return attention_weights(found, weighting.activation, weighting.factor, weighting.divisor, where.keys)


def for_heads(where: Whereabouts) -> Whereabouts:
    """The same for every head: rotations (T, B, n, s/2) -> (T, B, 1, n, s/2), and so on."""
    cos, sin, beyond = where.rotation.cos, where.rotation.sin, where.rotation.beyond
    keys, weighting = where.keys, where.weighting
    return Whereabouts(
        Rotation(cos.unsqueeze(2), sin.unsqueeze(2), beyond.unsqueeze(2)),
        Weighting(weighting.activation, weighting.factor.unsqueeze(1), weighting.divisor.unsqueeze(1)),
        None if keys is None else keys.unsqueeze(1),
    )
