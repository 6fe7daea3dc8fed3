"""Attention at rotary positions, as every kind of block has it."""

from typing import NamedTuple

from torch import Tensor

from heatssl.backbones.normalisers import Weighting
from heatssl.backbones.positions import Rotation, rotate, scores
from heatssl.ops import attention, attention_weights


class Whereabouts(NamedTuple):
    """What a block is told of its tokens (B, n, d), besides what they say.

    Attributes:
        rotation: of their places; for chunk attention of the places in chunks.
        weighting: of as many keys as there are.
        valid: (B, n) bool, which tokens are there, None: all; in chunks (B or 1, G, m), which places are taken.
        slots: chunk attention: (B or 1, n) long, the place g m + k in chunks of each token.
    """

    rotation: Rotation
    weighting: Weighting
    valid: Tensor | None
    slots: Tensor | None


def attend(query: Tensor, key: Tensor, value: Tensor, gate: Tensor | None, where: Whereabouts) -> Tensor:
    """Values (..., n, e) by queries and keys (..., n, s), times the gate (..., n, e) -> (..., n, e).

    The leading axes of ``where`` must broadcast with theirs: see :func:`for_heads`. Positions with a window need three
    scores for each pair, and have no fused attention.
    """
    rotation, weighting = where.rotation, where.weighting
    if rotation.beyond.numel() == 0:
        cos, sin = rotation.cos[0], rotation.sin[0]
        query, key, there = rotate(query, cos, sin), rotate(key, cos, sin), _keys_there(where.valid)
        return attention(query, key, value, gate, weighting.activation, weighting.factor, weighting.divisor, there)
    attended = weights(query, key, where) @ value
    return attended if gate is None else gate * attended


def weights(query: Tensor, key: Tensor, where: Whereabouts) -> Tensor:
    """How much of each key every query takes in :func:`attend`: (..., n, s) each -> (..., n, n)."""
    weighting, there = where.weighting, _keys_there(where.valid)
    found = scores(query, key, where.rotation)
    return attention_weights(found, weighting.activation, weighting.factor, weighting.divisor, there)


def _keys_there(valid: Tensor | None) -> Tensor | None:
    return None if valid is None else valid.unsqueeze(-2)


def for_heads(where: Whereabouts) -> Whereabouts:
    """The same for every head: rotations (T, B, n, s/2) -> (T, B, 1, n, s/2), and so on."""
    cos, sin, beyond = where.rotation.cos, where.rotation.sin, where.rotation.beyond
    valid, weighting = where.valid, where.weighting
    return Whereabouts(
        Rotation(cos.unsqueeze(2), sin.unsqueeze(2), beyond.unsqueeze(2)),
        Weighting(weighting.activation, weighting.factor.unsqueeze(1), weighting.divisor.unsqueeze(1)),
        None if valid is None else valid.unsqueeze(1),
        None,
    )
