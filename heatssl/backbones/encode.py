"""Run a timm model on whole images, or on the visible patches alone with their true positions.

timm's vision transformers see the whole grid; here the patch embedding, the position table and the blocks
are driven for a chosen set of patches, so that hidden patches cost nothing at all. timm's own parts do the
work: this file only decides which rows of them are used.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from timm.layers import apply_keep_indices_nlc, resample_abs_pos_embed
from timm.models import checkpoint, checkpoint_seq
from timm.models.eva import Eva
from torch import Tensor

from heatssl.backbones.fields import (
    as_field,
    check_encodes_patches,
    field_or_none,
    is_token_model,
    takes_valid,
    takes_visible,
)
from heatssl.backbones.patch_embedding import embed_patches
from heatssl.errors import UserError

PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")  # as timm's models name them, in their order

_now = SimpleNamespace(shown=None)  # what encode_visible is encoding

Backbone = Any  # an nn.Module of timm: its patch_embed, blocks and norm are more than nn.Module declares


def feature_map(backbone: Backbone, images: Tensor) -> Tensor:
    """The final feature map of a whole image, prefix tokens left out.

    Args:
        backbone: any timm model with ``forward_features``.
        images: normalised images (B, 3, H, W); for a transformer of another size than it was made for, its
            position table is resampled.

    Returns:
        field (B, C, rows, columns).
    """
    if is_token_model(backbone) and _has_other_size(backbone, images):
        patch = backbone.patch_embed.patch_size
        rows, columns = (side // length for side, length in zip(images.shape[2:], patch, strict=True))
        every = torch.arange(rows * columns, device=images.device).expand(len(images), -1)
        return encode_visible(backbone, images, every).transpose(1, 2).unflatten(2, (rows, columns))
    output = backbone.forward_features(images)
    field = field_or_none(backbone, output, images)
    if field is None and hasattr(backbone, "forward_intermediates"):
        # Some return their class token alone, or maps of several sizes.
        return last_intermediate(backbone, images)
    return as_field(backbone, output, images) if field is None else field


def last_intermediate(backbone: Backbone, images: Tensor) -> Tensor:
    """The last map that timm's own ``forward_intermediates`` gives: (B, 3, H, W) -> (B, C, rows, columns)."""
    (last,) = backbone.forward_intermediates(images, indices=1, intermediates_only=True, output_fmt="NCHW")
    return as_field(backbone, last, images)


def pooled_features(backbone: Backbone, images: Tensor) -> Tensor:
    """Mean of :func:`feature_map` over positions: images (B, 3, H, W) -> (B, C)."""
    return feature_map(backbone, images).mean(dim=(2, 3))


def encode_block(backbone: Backbone, images: Tensor, rows: Tensor, columns: Tensor, height: int, width: int) -> Tensor:
    """Encode one rectangle of patches of each image; nothing outside it is looked at or paid for.

    Token models keep the true positions of the patches. Convolutional models see the rectangle as a small
    image of its own.

    Args:
        backbone: a timm model.
        images: normalised images (B, 3, S, S), S a multiple of the feature stride.
        rows: (B,) long: grid row of each rectangle's top-left patch.
        columns: (B,) long: its grid column.
        height: rows of the rectangle, in patches.
        width: its columns, in patches.

    Returns:
        field (B, C, height, width).

    Raises:
        UserError: when a convolutional model's map of the rectangle has another size than asked for.
    """
    if is_token_model(backbone):
        grid_columns = images.shape[3] // backbone.patch_embed.patch_size[1]
        row_index = rows[:, None, None] + torch.arange(height, device=images.device)[:, None]
        column_index = columns[:, None, None] + torch.arange(width, device=images.device)
        visible = (row_index * grid_columns + column_index).flatten(1)
        tokens = encode_visible(backbone, images, visible)
        return tokens.transpose(1, 2).unflatten(2, (height, width))
    stride = _conv_stride(backbone)
    corners = zip(images, (rows * stride).tolist(), (columns * stride).tolist(), strict=True)
    crops = [image[:, top : top + height * stride, left : left + width * stride] for image, top, left in corners]
    field = feature_map(backbone, torch.stack(crops))
    if field.shape[2:] != (height, width):
        raise UserError(
            f"{type(backbone).__name__} turns a block of {height}x{width} positions into "
            f"{field.shape[2]}x{field.shape[3]}: use an image size that is a larger multiple of its stride"
        )
    return field


def encode_visible(backbone: Backbone, images: Tensor, visible: Tensor, valid: Tensor | None = None) -> Tensor:
    """Encode a set of visible patches, each at its true position; the cost is that of these patches alone.

    Args:
        backbone: a timm ``VisionTransformer`` or ``Eva``, or a model whose ``forward_features`` takes ``visible``.
        images: normalised images (B, 3, H, W); or their visible patches alone, (B, n, 3, h, w), which
            :func:`heatssl.backbones.cut_patches` cuts out of images of the model's own size.
        visible: (B, n) long, row-major patch indices, any order.
        valid: (B, n) bool, False where an entry of ``visible`` is padding; None: none is. Only for models whose
            ``forward_features`` takes it.

    Returns:
        normalised tokens (B, n, C) in the order of ``visible``, prefix tokens left out; of padding they mean nothing.

    Raises:
        UserError: when the model is of another kind, or padded sets are not for it.
    """
    check_encodes_patches(backbone, "encode_visible")
    if valid is not None and not takes_valid(backbone):
        raise UserError(
            f"{type(backbone).__name__} cannot leave padding out: encode sets of one length without valid, "
            "or choose a gau_*, flash_* or roformer_v2_* backbone"
        )
    patch = backbone.patch_embed.patch_size
    grid = backbone.patch_embed.grid_size
    if images.ndim == 4:
        grid = (images.shape[2] // patch[0], images.shape[3] // patch[1])
    if takes_visible(backbone):
        with _showing(visible, grid):
            padding = {} if valid is None else {"valid": valid}
            return backbone.forward_features(images, visible=visible, **padding)
    tokens = embed_patches(backbone.patch_embed, images, visible)
    tokens = _add_positions(backbone, tokens, visible, grid)
    with _showing(visible, grid):
        if isinstance(backbone, Eva):
            tokens = _eva_blocks(backbone, tokens, visible, grid)
        else:
            tokens = backbone.norm_pre(tokens)
            tokens = checkpoint_seq(backbone.blocks, tokens) if backbone.grad_checkpointing else backbone.blocks(tokens)
    return backbone.norm(tokens)[:, backbone.num_prefix_tokens :]


def patches_shown() -> tuple[Tensor, tuple[int, int]] | None:
    """For a hook on a layer: the patches (B, n) that :func:`encode_visible` encodes now, and their grid's two sides.

    None where it does not.
    """
    return _now.shown


@contextmanager
def _showing(visible: Tensor, grid: tuple[int, int]) -> Iterator[None]:
    before, _now.shown = _now.shown, (visible, grid)
    try:
        yield
    finally:
        _now.shown = before


def _has_other_size(backbone: Backbone, images: Tensor) -> bool:
    size = backbone.patch_embed.img_size
    return size is not None and tuple(size) != tuple(images.shape[2:])


def _add_positions(backbone: Backbone, tokens: Tensor, visible: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Prepend class and other tokens and add each token's row of the position table (B, n, C) -> (B, k + n, C)."""
    batch = tokens.shape[0]
    found = [getattr(backbone, name, None) for name in PREFIX_TOKENS]
    prefix = [token.expand(batch, -1, -1) for token in found if token is not None]
    if sum(token.shape[1] for token in prefix) != backbone.num_prefix_tokens:
        raise UserError(
            f"{type(backbone).__name__} has tokens before its patches that are not known here: choose another backbone"
        )
    table = backbone.pos_embed
    if table is not None:
        in_table = 0 if backbone.no_embed_class else backbone.num_prefix_tokens
        if tuple(grid) != tuple(backbone.patch_embed.grid_size):
            table = resample_abs_pos_embed(
                table,
                new_size=list(grid),
                old_size=list(backbone.patch_embed.grid_size),
                num_prefix_tokens=in_table,
            )
        tokens = tokens + table[0, in_table:][visible]
        if in_table:
            prefix = [torch.cat(prefix, dim=1) + table[:, :in_table]]
    return backbone.pos_drop(torch.cat([*prefix, tokens], dim=1))


def _eva_blocks(backbone: Backbone, tokens: Tensor, visible: Tensor, grid: tuple[int, ...]) -> Tensor:
    """Eva's blocks, with the rotary embedding of the visible positions (B, k + n, C) -> same."""
    tokens = backbone.norm_pre(tokens)
    rope = None if backbone.rope is None else backbone.rope.get_embed(shape=list(grid))
    if rope is not None:
        rope = apply_keep_indices_nlc(tokens, rope, visible)
        # As in timm: a head axis of size one for axial embeddings, depth first for mixed ones.
        rope = rope.transpose(0, 1) if getattr(backbone, "rope_mixed", False) else rope.unsqueeze(1)
    for depth, block in enumerate(backbone.blocks):
        turned = rope[depth] if rope is not None and getattr(backbone, "rope_mixed", False) else rope
        tokens = checkpoint(block, tokens, rope=turned) if backbone.grad_checkpointing else block(tokens, rope=turned)
    return tokens


def _conv_stride(backbone: Backbone) -> int:
    """Pixels per position of the final map, from timm's own feature description."""
    return int(backbone.feature_info[-1]["reduction"])
