"""roformer_v2_*: RoFormerV2 on patches (kexue.fm 8998): a post-norm transformer with little in it.

No biases; RMS norms without parameters after each residual; rotary positions, here in two dimensions. In pretraining
the layers are faded in, ``norm(x + ramp layer(x))`` with the ramp going from 0 to 1: without that a deep post-norm
model is hard to start.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts, attend, for_heads
from heatssl.backbones.patch_encoder import PatchEncoder, check_counts, truncated_normal_
from heatssl.backbones.residual import NormPlace, Residual

_ORDER = 2  # of the depth in the initialisation, RoFormerV2


class RoFormerEncoder(PatchEncoder):
    """Patches -> multi-head attention and feed-forward layers -> tokens.

    Args:
        num_heads: of attention.
        mlp_ratio: hidden width of the feed-forward layers over d.
        bias: of linear layers.
        norm_place: ``post`` as RoFormerV2.
        proj_drop_rate: dropout of what each layer adds.
        **settings: see :class:`PatchEncoder`.

    Raises:
        ValueError: when the heads do not divide the width, or there are none.
    """

    def __init__(
        self,
        *,
        embed_dim: int = 768,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        bias: bool = False,
        norm_place: NormPlace = "post",
        proj_drop_rate: float = 0.0,
        **settings: Any,
    ) -> None:
        check_counts(num_heads=num_heads, embed_dim=embed_dim)
        if embed_dim % num_heads:
            raise ValueError(f"{num_heads} heads do not divide a width of {embed_dim}")
        self.num_heads, self.mlp_ratio, self.bias, self.norm_place = num_heads, mlp_ratio, bias, norm_place
        self.dropout = proj_drop_rate
        super().__init__(embed_dim=embed_dim, key_width=embed_dim // num_heads, norm_place=norm_place, **settings)
        truncated_normal_(self.blocks.modules(), len(self.blocks), _ORDER)

    def block(self, drop_path: float) -> nn.Module:
        """See :meth:`PatchEncoder.block`: attention, then the feed-forward layer."""
        width = self.embed_dim
        attention = Attention(width, self.num_heads, bias=self.bias, dropout=self.dropout)
        feed_forward = FeedForward(width, round(self.mlp_ratio * width), bias=self.bias, dropout=self.dropout)
        return Block(*(Residual(layer, width, self.norm_place, drop_path) for layer in (attention, feed_forward)))


class Block(nn.Module):
    """Two residual layers: tokens (B, n, d) -> same."""

    def __init__(self, attention: Residual, feed_forward: Residual) -> None:
        super().__init__()
        self.attention = attention
        self.feed_forward = feed_forward

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        return self.feed_forward(self.attention(x, where), where)


class Attention(nn.Module):
    """Multi-head attention with rotary positions: tokens (B, n, d) -> same."""

    def __init__(self, width: int, heads: int, *, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.enter = nn.Linear(width, 3 * width, bias=bias)
        self.leave = nn.Linear(width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        query, key, value = self.query_key_value(x)
        attended = attend(query, key, value, for_heads(where))
        return self.dropout(self.leave(attended.transpose(1, 2).flatten(2)))

    def query_key_value(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What attends: tokens (B, n, d) -> three times (B, heads, n, d / heads)."""
        query, key, value = self.enter(x).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        return query, key, value


class FeedForward(nn.Module):
    """Token by token: linear, GELU, linear; where the tokens are is not asked."""

    def __init__(self, width: int, hidden: int, *, bias: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.enter = nn.Linear(width, hidden, bias=bias)
        self.leave = nn.Linear(hidden, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:  # noqa: ARG002
        return self.dropout(self.leave(F.gelu(self.enter(x))))
