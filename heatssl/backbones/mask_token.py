"""Run a timm model on whole images of which some patches are replaced by a mask token."""

from typing import Any

import torch
from timm.layers import to_2tuple
from torch import Tensor

from heatssl.backbones.encode import Backbone
from heatssl.backbones.fields import as_field
from heatssl.errors import UserError


def encode_masked(backbone: Backbone, images: Tensor, hidden: Tensor, mask_token: Tensor) -> Tensor:
    """The final feature map of images whose hidden patches have the mask token as their embedding.

    The token takes the place of what timm's patch embedding makes of a patch; positions are added behind it. So
    the model is told where something is hidden, and nothing of what.

    Args:
        backbone: a timm model with a patch embedding, Swin included.
        images: normalised images (B, 3, H, W).
        hidden: (B, rows, columns) bool, in a grid that the patch grid is a whole multiple of.
        mask_token: (E,), see :func:`embedding_width`.

    Returns:
        field (B, C, rows, columns).

    Raises:
        UserError: when the model's patches cannot be replaced.
    """

    def replace(patch_embed: Any, _: Any, embedded: Any) -> Tensor:
        if not isinstance(embedded, Tensor):
            raise UserError(
                f"the patch embedding of {type(backbone).__name__} returns more than patches: "
                "choose a vit_*, deit_*, eva* or swin_* backbone"
            )
        patch = to_2tuple(patch_embed.patch_size)
        rows, columns = images.shape[2] // patch[0], images.shape[3] // patch[1]
        where = hidden.repeat_interleave(rows // hidden.shape[1], dim=1)
        where = where.repeat_interleave(columns // hidden.shape[2], dim=2)
        if embedded.shape[:-1].numel() != where.numel() or embedded.shape[-1] != len(mask_token):
            raise UserError(
                f"the patch embedding of {type(backbone).__name__} returns {tuple(embedded.shape)}, "
                "no patches that a mask token could replace: choose a vit_*, deit_*, eva* or swin_* backbone"
            )
        where = where.reshape(*embedded.shape[:-1], 1)  # tokens (B, n, E), or laid out (B, rows, columns, E)
        return torch.where(where, mask_token.to(embedded.dtype), embedded)

    embedding_width(backbone)  # is there a patch embedding at all?
    hook = backbone.patch_embed.register_forward_hook(replace)
    try:
        return as_field(backbone, backbone.forward_features(images), images)
    finally:
        hook.remove()


def embedding_width(backbone: Backbone) -> int:
    """Channels of a model's patch embedding.

    Raises:
        UserError: when it has none.
    """
    width = getattr(backbone, "embed_dim", None)
    patch_embed = getattr(backbone, "patch_embed", None)
    if not isinstance(width, int) or getattr(patch_embed, "patch_size", None) is None:
        raise UserError(
            f"{type(backbone).__name__} has no patch embedding in which a mask token could stand: "
            "choose a vit_*, deit_*, eva* or swin_* backbone"
        )
    return width
