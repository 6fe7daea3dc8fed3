"""gau_*: Gated Attention Units as the only layer (FLASH-Quad of arXiv 2202.10447; GAU-alpha).

Twice as many units as a ViT has blocks, e = 2 d, hold the parameters of that ViT. Of GAU-alpha are softmax_plus, the
initialisation and that there are no biases; of FLASH ``x + unit(norm(x))``; values are linear, as in SwiGLU, and
attention mixes s of their e channels: frozen features are better so, and cost less (docs/backbones.md).
``norm_place="post", value_activation="silu", mixed_share=1.0`` is GAU-alpha.
"""

from typing import Any

from torch import nn

from heatssl.backbones.gated_attention_unit import GatedAttentionUnit, GatedUnit, ValueActivation
from heatssl.backbones.patch_encoder import PatchEncoder, truncated_normal_
from heatssl.backbones.residual import NormPlace, Residual

_ORDER = 3  # of the depth in the initialisation, GAU-alpha


class GatedAttentionEncoder(PatchEncoder):
    """Patches -> gated attention units -> tokens.

    Args:
        expansion: e over d.
        key_width: s.
        bias: of linear layers, and offsets of queries and keys.
        value_activation: ``none``, or ``silu`` as FLASH and GAU-alpha.
        mixed_share: of the values' channels, that attention mixes; 1: all, as FLASH and GAU-alpha. The others are
            each token's own. None: as many as ``key_width``, which torch's fused attention takes.
        norm_place: ``pre`` as FLASH, or ``post`` as GAU-alpha.
        proj_drop_rate: dropout of what each layer adds.
        **settings: see :class:`PatchEncoder`.

    Attributes:
        unit: the layer.

    Raises:
        ValueError: on settings out of their range.
    """

    unit: type[GatedUnit] = GatedAttentionUnit

    def __init__(
        self,
        *,
        expansion: float = 2.0,
        key_width: int = 128,
        bias: bool = False,
        value_activation: ValueActivation = "none",
        mixed_share: float | None = None,
        norm_place: NormPlace = "pre",
        proj_drop_rate: float = 0.0,
        **settings: Any,
    ) -> None:
        self.expansion, self.key_width, self.bias, self.norm_place = expansion, key_width, bias, norm_place
        self.value_activation, self.dropout = value_activation, proj_drop_rate
        self.mixed_share = mixed_share
        super().__init__(key_width=key_width, norm_place=norm_place, **settings)
        truncated_normal_(self.blocks.modules(), len(self.blocks), _ORDER)

    def block(self, drop_path: float) -> nn.Module:
        """See :meth:`PatchEncoder.block`: one unit."""
        inner = round(self.expansion * self.embed_dim)
        mixed = min(self.key_width, inner) if self.mixed_share is None else round(self.mixed_share * inner)
        if not 0 < mixed <= inner:
            raise ValueError(f"mixed_share={self.mixed_share} mixes {mixed} of {inner} channels: choose up to 1")
        unit = self.unit(
            self.embed_dim,
            inner,
            self.key_width,
            bias=self.bias,
            value_activation=self.value_activation,
            mixed_width=mixed,
            dropout=self.dropout,
        )
        return Residual(unit, self.embed_dim, self.norm_place, drop_path)
