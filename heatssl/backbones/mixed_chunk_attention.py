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
from torch import Tensor

from heatssl.backbones.attend import Whereabouts, attend, weights
from heatssl.backbones.gated_attention_unit import GatedUnit
from heatssl.backbones.positions import rotate


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
        if tiles is not None:
            x = into_tiles(x, tiles)
        gate, value, z = self.gate_value_z(x)
        mixed, own = value.split(self.apart, dim=-1)
        change = self.dropout(self.gated(gate, self.attend(mixed, z, where), own))
        return change if tiles is None else out_of_tiles(change, tiles)

    def attend(self, value: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """See :meth:`GatedUnit.attend`; tokens are in tiles (B, G, m, ...), have slots in chunks, or are few."""
        slots, batch = where.slots, value.shape[0]
        if where.tiles is not None:
            return self.by_chunks(value, z, where)
        if slots is None:
            return self.by_pairs(value, z, where)
        chunks, places = where.key_rotation.cos.shape[-3], where.key_rotation.cos.shape[-2]
        value, z = into_chunks(value, slots, chunks, places), into_chunks(z, slots, chunks, places)
        found = self.by_chunks(value, z, where).flatten(1, 2)
        slots = slots.clamp_max(chunks * places - 1)  # for padding whatever is found
        return found.gather(1, slots[..., None].expand(batch, -1, found.shape[2]))

    def by_pairs(self, value: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """A written out, near and far in one matrix: (B, n, e), (B, n, s) -> (B, n, e)."""
        query, key, far_query, far_key = self.query_key(z).unbind(-2)
        cos, sin, valid, number = where.key_rotation.cos[0], where.key_rotation.sin[0], where.valid, where.number
        assert number is not None
        if valid is not None:
            value = value.masked_fill(~valid.unsqueeze(-1), 0.0)
        far_query = (rotate(far_query, cos, sin) / number).to(z.dtype)
        far = far_query @ rotate(far_key, cos, sin).transpose(-2, -1)
        return (weights(query, key, where) + far) @ value

    def by_chunks(self, value: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """Near inside each chunk; far by one sum over all of them: (B, G, m, e), (B, G, m, s) -> (B, G, m, e).

        Values are zero where a place is empty.
        """
        query, key, far_query, far_key = self.query_key(z).unbind(-2)
        near = attend(query, key, value, where)
        cos, sin, number = where.key_rotation.cos[0], where.key_rotation.sin[0], where.number
        assert number is not None
        root = number.sqrt()  # half of the division before the sum, which would leave the range of float16
        far_key = (rotate(far_key, cos, sin).flatten(1, 2) / root).to(z.dtype)
        memory = far_key.transpose(-2, -1) @ value.flatten(1, 2) / root  # B s e
        far = rotate(far_query, cos, sin).flatten(1, 2) @ memory.to(z.dtype)
        return near + far.unflatten(1, (z.shape[1], z.shape[2]))


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


def into_chunks(x: Tensor, slots: Tensor, chunks: int, places: int) -> Tensor:
    """Put each token in its slot: (B, n, d), (B or 1, n) -> (B, chunks, places, d), zero elsewhere.

    Slots from ``chunks * places`` on are for tokens that are not to be there.
    """
    room = torch.zeros(x.shape[0], chunks * places + 1, x.shape[2], dtype=x.dtype, device=x.device)
    filled = room.scatter(1, slots[..., None].expand(x.shape[0], -1, x.shape[2]), x)
    return filled[:, :-1].unflatten(1, (chunks, places))
