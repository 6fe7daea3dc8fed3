"""Attention rollout (Abnar and Zuidema, ACL 2020, arXiv 2005.00928)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attention import AttentionLayer, read_out, recorded_attention, to_map
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import owners
from heatssl.attribution.targets import Target
from heatssl.ops import full_precision


@torch.no_grad()
def attention_rollout(model: nn.Module, images: Tensor, target: Target, *, chunk: int = 32) -> Attribution:
    """How much of each patch attention has carried to where the target reads, layer by layer.

    map = r R_L ... R_1 (eq. 1), R_l = (A_l + I) / 2 with the weights A_l, mean over heads, and the identity for the
    residual path. r takes the class token where a classifier reads it, else the mean over patches. Beyond r, the target
    plays no part.

    In a gated unit query i takes A_ij (u_i * v_j) from key j, with the gate u and the value v. The weight alone does
    not say what passes: here A_ij |u_i * v_j| stands for A_ij, the size of what does (as Kobayashi et al., EMNLP 2020,
    arXiv 2004.10102, for attention without a gate), each row scaled to the sum one.

    Args:
        model: in evaluation mode; a transformer with attention over the whole image.
        images: normalised (B, 3, H, W).
        target: says what is read.
        chunk: images per forward pass; their weights (layers, heads, n, n) are held in memory.

    Returns:
        Maps (B, h, w) >= 0; with what falls to prefix tokens they sum to one. No completeness error.

    Raises:
        UserError: when the model has no attention over all positions.
    """
    maps = []
    for owner, _ in owners(images, chunk):
        points = images[owner]
        with recorded_attention(model) as layers:
            target(points, owner)
        row = read_out(model, points, target, layers)
        with full_precision(row):
            for layer in reversed(layers):
                row = (row + torch.einsum("bi,bij->bj", row, attention_rows(layer))) / 2
        maps.append(to_map(model, points, row))
    return Attribution(torch.cat(maps))


def attention_rows(layer: AttentionLayer) -> Tensor:
    """What each token takes from each: (B, n, n) float32, rows sum to one; a token that takes nothing keeps itself."""
    rows = layer.weights.float() if layer.size is None else layer.weights.float() * layer.size
    rows = rows.mean(dim=1)
    total = rows.sum(dim=-1, keepdim=True)
    itself = torch.eye(rows.shape[-1], device=rows.device)
    return torch.where(total > 0, rows / total, itself)
