"""Mixed chunk attention (FLASH, arXiv 2202.10447, section 3): quadratic inside a chunk, linear across chunks.

    A V = normalise(Q K^T) V inside each chunk  +  (1 / n) Q_lin sum over all keys K_lin^T V
    O = (U * A V) W_o,  all four of Q, K, Q_lin, K_lin affine maps of the same Z

Chunks are squares of the patch grid here, not runs of a sequence; nothing is causal. The cost is linear in the
number of tokens.

Across chunks queries and keys are turned by their places alone, before they meet. A window of offsets (``rerope``,
``leaky_rerope``) has no such form: it acts inside chunks, and across them positions are plain ``rope``.
"""

from typing import Any

import torch
from torch import Tensor

from heatssl.backbones.attend import Whereabouts, attend
from heatssl.backbones.gated_attention_unit import GatedUnit
from heatssl.backbones.positions import rotate


class MixedChunkAttention(GatedUnit):
    """Attention in chunks, linear attention across; arguments are those of :class:`GatedUnit`."""

    maps = 4

    def __init__(self, width: int, inner_width: int, key_width: int, *arguments: Any, **settings: Any) -> None:
        super().__init__(width, inner_width, key_width, *arguments, **settings)
        with torch.no_grad():
            self.query_key.scale[2] = key_width**-0.5  # far queries: scores of the size of those near, at first

    def attend(self, value: Tensor, gate: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """See :meth:`GatedUnit.attend`; tokens have places in G chunks of m each."""
        rotation, taken, slots = where.rotation, where.valid, where.slots
        assert slots is not None
        chunks, places = rotation.cos.shape[-3], rotation.cos.shape[-2]
        value = into_chunks(value, slots, chunks, places)  # zero where nothing is
        query, key, far_query, far_key = self.query_key(into_chunks(z, slots, chunks, places)).unbind(-2)
        near = attend(query, key, value, None, where)
        cos, sin = rotation.cos[0], rotation.sin[0]
        count = torch.full((1, 1, 1), float(chunks * places), device=z.device)
        if taken is not None:
            count = taken.sum(dim=(1, 2)).clamp_min(1)[:, None, None]
        memory = rotate(far_key, cos, sin).flatten(1, 2).transpose(-2, -1) @ value.flatten(1, 2) / count  # B s e
        far = rotate(far_query, cos, sin).flatten(1, 2) @ memory.to(z.dtype)
        found = near.flatten(1, 2) + far
        slots = slots.clamp_max(chunks * places - 1)  # for padding whatever is found
        return gate * found.gather(1, slots[..., None].expand(z.shape[0], -1, found.shape[2]))


def into_chunks(x: Tensor, slots: Tensor, chunks: int, places: int) -> Tensor:
    """Put each token in its slot: (B, n, d), (B or 1, n) -> (B, chunks, places, d), zero elsewhere.

    Slots from ``chunks * places`` on are for tokens that are not to be there.
    """
    room = torch.zeros(x.shape[0], chunks * places + 1, x.shape[2], dtype=x.dtype, device=x.device)
    filled = room.scatter(1, slots[..., None].expand(x.shape[0], -1, x.shape[2]), x)
    return filled[:, :-1].unflatten(1, (chunks, places))
