"""Mixed chunk attention (FLASH, arXiv 2202.10447, section 3): quadratic inside a chunk, linear across chunks.

    A V = normalise(Q K^T) V inside each chunk  +  (1 / n) Q_lin sum over all keys K_lin^T V
    O = (U * A V) W_o,  all four of Q, K, Q_lin, K_lin affine maps of the same Z

Chunks are squares of the patch grid here, not runs of a sequence; nothing is causal. The cost is linear in the
number of tokens. A grid that fills its chunks is cut into them as it is, and few tokens, whose pairs are no more than
those of all chunks, are mixed by one matrix, the same sum; else tokens are sorted into chunks.

Across chunks queries and keys are turned by their places alone, before they meet. A window of offsets (``rerope``,
``leaky_rerope``) has no such form: it acts inside chunks, and across them positions are plain ``rope``.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts, attend_turned, turned, weights_of_turned
from heatssl.backbones.gated_attention_unit import GatedUnit, is_untouched
from heatssl.backbones.positions import turn
from heatssl.ops import recompute


class MixedChunkAttention(GatedUnit):
    """Attention in chunks, linear attention across; arguments are those of :class:`GatedUnit`."""

    maps = 4

    def __init__(self, width: int, inner_width: int, key_width: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(width, inner_width, key_width, *arguments, **settings)
        with torch.no_grad():
            self.query_key.scale[2] = key_width**-0.5  # far queries: scores of the size of those near, at first

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        """See :meth:`GatedUnit.forward`."""
        tiles = where.tiles
        gate, value, z = self.apart_as_entered(self.enter(x) if tiles is None else self.enter_in_tiles(x, tiles))
        mixed, own = value.split(self.apart, dim=-1)
        slots = where.slots
        if slots is None:
            attended = self.attend(mixed, z, where)
        else:
            chunks, places = where.key_rotation.turns.shape[-4], where.key_rotation.turns.shape[-3]
            mixed, z = into_chunks(mixed, slots, chunks, places), into_chunks(z, slots, chunks, places)
            attended = out_of_chunks(self.attend(mixed, z, where), slots, chunks, places)
        change = self.dropout(self.gated(gate, attended, own))
        return change if tiles is None else out_of_tiles(change, tiles)

    def enter_in_tiles(self, x: Tensor, tiles: tuple[int, int, int, int]) -> Tensor:
        """The first layer of tokens in tiles, (B, n, d) -> (B, G, m, ...), which are cut again in the backward pass."""
        if not torch.jit.is_scripting() and self.enters_by_product():
            return self.enter_in_tiles_again(x, tiles)
        entered: Tensor = self.enter(into_tiles(x, tiles))
        return entered

    @torch.jit.unused
    def enters_by_product(self) -> bool:
        """Whether the first layer is its product and no more."""
        return is_untouched(self.enter, nn.Linear)

    @torch.jit.unused
    def enter_in_tiles_again(self, x: Tensor, tiles: tuple[int, int, int, int]) -> Tensor:
        return recompute(lambda x: [into_tiles(x, tiles)], F.linear, (x,), tuple(self.enter.parameters()))

    def turn(self, maps: Tensor, where: Whereabouts) -> list[Tensor]:
        """See :meth:`GatedUnit.turn`: those near, and those far, over the root of the number of tokens each."""
        query, key, far_query, far_key = maps.unbind(-2)
        far = where.far_rotation
        assert far is not None
        return [*turned(query, key, where), turn(far_query, far), turn(far_key, far)]

    def mix(self, maps: list[Tensor], value: Tensor, where: Whereabouts) -> Tensor:
        """See :meth:`GatedUnit.mix`; in chunks (B, G, m, ...), or few tokens, near and far in one matrix."""
        query, key, far_query, far_key = maps
        if value.ndim == 3:
            valid = where.valid
            if valid is not None:
                value = value.masked_fill(~valid.unsqueeze(-1), 0.0)
            return (weights_of_turned(query, key, where) + far_query @ far_key.transpose(-2, -1)) @ value
        # One sum over all chunks, in which values are zero where a place is empty.
        memory = far_key.flatten(1, 2).transpose(-2, -1) @ value.flatten(1, 2)  # B s m
        far = far_query.flatten(1, 2) @ memory
        return attend_turned(query, key, value, where) + far.view(value.shape)


def into_tiles(x: Tensor, tiles: tuple[int, int, int, int]) -> Tensor:
    """Tokens of a grid, row by row, cut into full chunks: (B, n, d) -> (B, G, m, d)."""
    down, across, height, width = tiles
    rows = x.view(x.shape[0], down, height, across, width, x.shape[2])
    return rows.transpose(2, 3).reshape(x.shape[0], down * across, height * width, x.shape[2])


def out_of_tiles(x: Tensor, tiles: tuple[int, int, int, int]) -> Tensor:
    """Back from :func:`into_tiles`: (B, G, m, d) -> (B, n, d)."""
    down, across, height, width = tiles
    chunks = x.view(x.shape[0], down, across, height, width, x.shape[3])
    return chunks.transpose(2, 3).reshape(x.shape[0], -1, x.shape[3])


def out_of_chunks(x: Tensor, slots: Tensor, chunks: int, places: int) -> Tensor:
    """Back from :func:`into_chunks`: (B, G, m, d) -> (B, n, d), for padding whatever is found."""
    slots = slots.clamp_max(chunks * places - 1)
    return x.flatten(1, 2).gather(1, slots[..., None].expand(x.shape[0], -1, x.shape[3]))


def into_chunks(x: Tensor, slots: Tensor, chunks: int, places: int) -> Tensor:
    """Put each token in its slot: (B, n, d), (B or 1, n) -> (B, chunks, places, d), zero elsewhere.

    Slots from ``chunks * places`` on are for tokens that are not to be there.
    """
    room = torch.zeros(x.shape[0], chunks * places + 1, x.shape[2], dtype=x.dtype, device=x.device)
    filled = room.scatter(1, slots[..., None].expand(x.shape[0], -1, x.shape[2]), x)
    return filled[:, :-1].reshape(x.shape[0], chunks, places, x.shape[2])  # unflatten's sizes are constants in ONNX
