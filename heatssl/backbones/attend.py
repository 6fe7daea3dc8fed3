"""Attention at rotary positions, as every kind of block has it."""

from typing import NamedTuple

from torch import Tensor

from heatssl.backbones.positions import Rotation, rotate, scores
from heatssl.ops import attention, attention_weights


class Whereabouts(NamedTuple):
    """What a block is told of its tokens (B, n, d), besides what they say.

    Attributes:
        query_rotation: of their places, times the factor of scores; in chunk attention of the places in G chunks of m
            each.
        key_rotation: the same without the factor.
        activation: ``softmax`` or ``relu2``.
        keys: bool, broadcasting with (B, n, n), in chunks with (B, G, m, m): which keys each query has; None: all.
        valid: chunk attention: (B, n) bool, which tokens are there; None: all.
        number: chunk attention: how many these are, float32, broadcasting with (B, 1, 1).
        slots: chunk attention: (B or 1, n) long, the place g m + k of each token; None: tokens stand as they are.
        tiles: chunk attention: chunks down and across and rows and columns of each, where they are full; else None.
    """

    query_rotation: Rotation
    key_rotation: Rotation
    activation: str
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
    if where.key_rotation.beyond.numel() == 0:
        query, key = turned(query, key, where)
        return attention(query, key, value, None, where.activation, where.keys)
    return weights(query, key, where) @ value


def turned(query: Tensor, key: Tensor, where: Whereabouts) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., n, s) at their places, without a window: what :func:`heatssl.ops.attention` takes."""
    of_queries, of_keys = where.query_rotation, where.key_rotation
    return rotate(query, of_queries.cos[0], of_queries.sin[0]), rotate(key, of_keys.cos[0], of_keys.sin[0])


def weights(query: Tensor, key: Tensor, where: Whereabouts) -> Tensor:
    """How much of each key every query takes in :func:`attend`: (..., n, s) each -> (..., n, n)."""
    found = scores(query, key, where.query_rotation, where.key_rotation)
    return attention_weights(found, where.activation, where.keys)


def for_heads(where: Whereabouts) -> Whereabouts:
    """The same for every head: rotations (T, B, n, s) -> (T, B, 1, n, s), and so on."""
    keys = where.keys
    return Whereabouts(
        _for_heads(where.query_rotation),
        _for_heads(where.key_rotation),
        where.activation,
        None if keys is None else keys.unsqueeze(1),
    )


def _for_heads(rotation: Rotation) -> Rotation:
    return Rotation(rotation.cos.unsqueeze(2), rotation.sin.unsqueeze(2), rotation.beyond.unsqueeze(2))
