"""Mixed chunk attention (FLASH, arXiv 2202.10447, section 3): quadratic inside a chunk, linear across chunks.

    A V = normalise(Q K^T) V inside each chunk  +  (1 / n) Q_lin sum over all keys K_lin^T V
    O = (U * A V) W_o,  all four of Q, K, Q_lin, K_lin affine maps of the same Z

Chunks are squares of the patch grid here, not runs of a sequence; nothing is causal. The cost is linear in the
number of tokens.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones.gated_attention_unit import ScaleOffset
from heatssl.backbones.normalisers import Normaliser, NormaliserSettings
from heatssl.backbones.positions import Whereabouts, rotate, scores


class MixedChunkAttention(nn.Module):
    """Tokens (B, n, d) -> same.

    Args:
        width: d.
        inner_width: e.
        key_width: s.
        normaliser: from scores inside a chunk to weights; its length is that of a chunk.
        bias: whether linear layers have biases, and queries and keys offsets.
        dropout: of the output.
    """

    def __init__(
        self,
        width: int,
        inner_width: int,
        key_width: int,
        normaliser: NormaliserSettings,
        *,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.widths = [inner_width, inner_width, key_width]
        self.enter = nn.Linear(width, sum(self.widths), bias=bias)
        self.query_key = ScaleOffset(key_width, 4, offset=bias)
        with torch.no_grad():
            self.query_key.scale[2] = key_width**-0.5  # far queries: scores of the size of those near, at first
        self.normalise = Normaliser(key_width, normaliser)
        self.leave = nn.Linear(inner_width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        """Tokens (B, n, d), and their places in G chunks of m each -> (B, n, d)."""
        rotation, taken, slots = where
        assert slots is not None
        chunks, places = rotation.cos.shape[-3], rotation.cos.shape[-2]
        gate, value, z = F.silu(self.enter(x)).split(self.widths, dim=-1)
        query, key, far_query, far_key = (
            into_chunks(self.query_key(z).flatten(2), slots, chunks, places).unflatten(-1, (4, -1)).unbind(-2)
        )
        value = into_chunks(value, slots, chunks, places)  # zero where nothing is
        keys = None if taken is None else taken.unsqueeze(-2)
        near = self.normalise(scores(query, key, rotation), keys) @ value
        cos, sin = rotation.cos[0], rotation.sin[0]
        count = torch.full((1, 1, 1), float(chunks * places), device=x.device)
        if taken is not None:
            count = taken.sum(dim=(1, 2)).clamp_min(1)[:, None, None]
        memory = rotate(far_key, cos, sin).flatten(1, 2).mT @ value.flatten(1, 2) / count  # B s e
        far = rotate(far_query, cos, sin).flatten(1, 2) @ memory.to(x.dtype)
        found = near.flatten(1, 2) + far
        found = found.gather(1, slots.clamp_max(chunks * places - 1)[..., None].expand(x.shape[0], -1, found.shape[2]))
        return self.dropout(self.leave(gate * found))


def into_chunks(x: Tensor, slots: Tensor, chunks: int, places: int) -> Tensor:
    """Put each token in its slot: (B, n, d), (B or 1, n) -> (B, chunks, places, d), zero elsewhere.

    Slots from ``chunks * places`` on are for tokens that are not to be there.
    """
    room = torch.zeros(x.shape[0], chunks * places + 1, x.shape[2], dtype=x.dtype, device=x.device)
    filled = room.scatter(1, slots[..., None].expand(x.shape[0], -1, x.shape[2]), x)
    return filled[:, :-1].unflatten(1, (chunks, places))
