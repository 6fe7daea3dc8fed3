"""Where the norm goes around a residual layer, and how much of the layer is added."""

from typing import Literal

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts
from heatssl.backbones.norm import RMSNorm
from heatssl.errors import UserError

NormPlace = Literal["pre", "post"]


class Residual(nn.Module):
    """``x + layer(norm(x))``, or ``norm(x + ramp * layer(x))`` with a norm that has no parameters (GAU-alpha).

    Args:
        layer: tokens (B, n, d), where they are -> (B, n, d).
        width: d.
        norm_place: ``pre`` or ``post``.
        drop_path: probability that an image leaves the layer out.

    Attributes:
        ramp: 1; RoFormerV2 lets it grow from 0 in training (kexue.fm 8998), see :func:`fade_in`.
    """

    ramp: Tensor

    def __init__(self, layer: nn.Module, width: int, norm_place: NormPlace, drop_path: float = 0.0) -> None:
        super().__init__()
        self.layer = layer
        self.is_post = norm_place == "post"
        is_pre = not self.is_post
        self.norm = RMSNorm(width, eps=1e-6, elementwise_affine=is_pre, before_linear=is_pre)
        self.drop_path = DropPath(drop_path) if drop_path else nn.Identity()
        self.register_buffer("ramp", torch.ones(()), persistent=self.is_post)

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        inside = x if self.is_post else self.norm(x)
        change = self.layer(inside, where)
        if self.is_post:
            return self.norm(x + self.ramp * self.drop_path(change))
        return x + self.drop_path(change)


def fade_in(model: nn.Module, share: float) -> None:
    """Let every post-norm layer add this share, from 0 to 1, of what it makes.

    Raises:
        UserError: when there is no such layer.
    """
    layers = [module for module in model.modules() if isinstance(module, Residual) and module.is_post]
    if not layers:
        raise UserError(
            f"optimizer.fade_in_steps: {type(model).__name__} has no post-norm layer to fade in: set it to 0, "
            "or choose a roformer_v2_* backbone, or backbone_arguments.norm_place=post of a gau_* or flash_*"
        )
    for layer in layers:
        layer.ramp.fill_(share)
