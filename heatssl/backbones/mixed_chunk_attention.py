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
from heatssl.backbones.positions import Rotation, rotate, scores


class MixedChunkAttention(nn.Module):
    """Tokens in chunks (B, G, m, d) -> same.

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

    def forward(self, x: Tensor, rotation: Rotation, valid: Tensor | None = None) -> Tensor:
        """One layer.

        Args:
            x: tokens (B, G, m, d) of G chunks of m places each.
            rotation: of the places (B or 1, G, m).
            valid: (B or 1, G, m) bool, False where a place is empty; None: all are taken.

        Returns:
            (B, G, m, d); at empty places whatever comes out.
        """
        chunks, places = x.shape[1], x.shape[2]
        gate, value, z = F.silu(self.enter(x)).split(self.widths, dim=-1)
        query, key, far_query, far_key = self.query_key(z).unbind(-2)
        keys = None if valid is None else valid.unsqueeze(-2)
        count = torch.full((1, 1, 1), float(chunks * places), device=x.device)
        if valid is not None:
            value = value * valid.unsqueeze(-1)
            count = valid.sum(dim=(1, 2), dtype=torch.float32)[:, None, None].clamp_min(1)
        near = self.normalise(scores(query, key, rotation), keys) @ value
        cos, sin = rotation.cos[0], rotation.sin[0]
        memory = rotate(far_key, cos, sin).flatten(1, 2).mT @ value.flatten(1, 2)  # B s e
        far = rotate(far_query, cos, sin).flatten(1, 2) @ (memory / count.to(x.dtype))
        return self.dropout(self.leave(gate * (near + far.unflatten(1, (chunks, places)))))
