"""Attention at rotary positions, as every kind of block has it."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from heatssl.backbones.positions import Rotation, scores_with_window, turn
from heatssl.ops import attention, attention_weights, recompute
from heatssl.ops.surroundings import autocast_type


class Whereabouts(NamedTuple):
    """What a block is told of its tokens (B, n, d), besides what they say.

    Attributes:
        query_rotation: of their places, times the factor of scores; in chunk attention of the places in G chunks of m
            each.
        key_rotation: the same without the factor.
        activation: ``softmax`` or ``relu2``.
        keys: bool, broadcasting with (B, n, n), in chunks with (B, G, m, m): which keys each query has; None: all.
        valid: chunk attention: (B, n) bool, which tokens are there; None: all.
        far_rotation: chunk attention: that of keys over the root of how many these are.
        slots: chunk attention: (B or 1, n) long, the place g m + k of each token; None: tokens stand as they are.
        tiles: chunk attention: chunks down and across and rows and columns of each, where they are full; else None.
    """

    query_rotation: Rotation
    key_rotation: Rotation
    activation: str
    keys: Tensor | None
    valid: Tensor | None = None
    far_rotation: Rotation | None = None
    slots: Tensor | None = None
    tiles: tuple[int, int, int, int] | None = None


def attend(query: Tensor, key: Tensor, value: Tensor, where: Whereabouts) -> Tensor:
    """Values (..., n, m) by queries and keys (..., n, s) -> (..., n, m).

    The leading axes of ``where`` must broadcast with theirs: see :func:`for_heads`.
    """
    if not torch.jit.is_scripting():
        return _attend(query, key, value, where)
    query, key = turned(query, key, where)
    return attend_turned(query, key, value, where)


@torch.jit.unused
def _attend(query: Tensor, key: Tensor, value: Tensor, where: Whereabouts) -> Tensor:
    """:func:`attend` that turns queries and keys again in the backward pass."""

    def make(query: Tensor, key: Tensor) -> Sequence[Tensor]:
        return turned(query, key, where)

    def use(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return attend_turned(query, key, value, where)

    return turning_again(make, use, (query, key), value, where)


def turning_again(
    make: Callable[..., Sequence[Tensor]],
    use: Callable[..., Tensor],
    inputs: Sequence[Tensor],
    value: Tensor,
    where: Whereabouts,
) -> Tensor:
    """``use(*make(*inputs), value)``, of queries and keys at their places that are made again in the backward pass.

    Under autocast they are made in its type, as attention would ask for, but where a window has yet to turn them.
    """
    narrow = None if where.key_rotation.beyond.numel() > 0 else autocast_type(value)

    def narrowed(*given: Tensor) -> Sequence[Tensor]:
        made = make(*given)
        return made if narrow is None else [each.to(narrow) for each in made]

    return recompute(narrowed, use, inputs, (value,))


def turned(query: Tensor, key: Tensor, where: Whereabouts) -> tuple[Tensor, Tensor]:
    """Queries and keys (..., n, s) at their places; with a window, where each pair decides, as they are."""
    of_queries, of_keys = where.query_rotation, where.key_rotation
    if of_keys.beyond.numel() > 0:
        return query, key
    return turn(query, of_queries), turn(key, of_keys)


def attend_turned(query: Tensor, key: Tensor, value: Tensor, where: Whereabouts) -> Tensor:
    """:func:`attend` for what :func:`turned` gives. With a window each pair has three scores: no fused attention."""
    if where.key_rotation.beyond.numel() > 0:
        return weights_of_turned(query, key, where) @ value
    return attention(query, key, value, None, where.activation, where.keys)


def weights(query: Tensor, key: Tensor, where: Whereabouts) -> Tensor:
    """How much of each key every query takes in :func:`attend`: (..., n, s) each -> (..., n, n)."""
    query, key = turned(query, key, where)
    return weights_of_turned(query, key, where)


def weights_of_turned(query: Tensor, key: Tensor, where: Whereabouts) -> Tensor:
    """:func:`weights` for what :func:`turned` gives."""
    if where.key_rotation.beyond.numel() > 0:
        found = scores_with_window(query, key, where.query_rotation, where.key_rotation)
    else:
        found = query @ key.transpose(-2, -1)
    return attention_weights(found, where.activation, where.keys)


def for_heads(where: Whereabouts) -> Whereabouts:
    """The same for every head: rotations (T, B, n, s / 2, 2) -> (T, B, 1, n, s / 2, 2), and so on."""
    keys = where.keys
    return Whereabouts(
        _for_heads(where.query_rotation),
        _for_heads(where.key_rotation),
        where.activation,
        None if keys is None else keys.unsqueeze(1),
    )


def _for_heads(rotation: Rotation) -> Rotation:
    return Rotation(rotation.turns.unsqueeze(2), rotation.beyond.unsqueeze(2))
