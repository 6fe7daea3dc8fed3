"""Gradient-weighted attention rollout (Chefer, Gur and Wolf, ICCV 2021, arXiv 2103.15679)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attention import read_out, recorded_attention, to_map
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import owners
from heatssl.attribution.targets import Target
from heatssl.errors import UserError
from heatssl.ops import full_precision


def gradient_rollout(model: nn.Module, images: Tensor, target: Target, *, chunk: int = 32) -> Attribution:
    """Attention rollout that follows only the weights which raise the score, by how much they do.

    R starts as I; each layer adds to it: R <- R + A' R (eq. 6), A' = mean over heads of ReLU(dy / dA * A) (eq. 5).
    map = r (R - I): what has come to where the target reads, without what was there from the start; r takes the class
    token where a classifier reads it, else the mean over patches.

    In a gated unit the gradient of a weight A_ij passes through the gate, dy / dA_ij = (u_i * W_o^T dy / do_i) . v_j:
    weight times gradient then is what the pair adds to the score to first order, gate included.

    Args:
        model: in evaluation mode; a transformer with attention over the whole image.
        images: normalised (B, 3, H, W).
        target: the score y.
        chunk: images per forward pass; their weights (layers, heads, n, n) are held in memory.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: when the model has no attention over all positions.
    """
    maps = []
    for owner, _ in owners(images, chunk):
        points = images[owner].detach().requires_grad_()  # weights may be frozen: the graph begins at the images
        with recorded_attention(model) as layers:
            score = target(points, owner, local=True)
        start = read_out(model, points, target, layers)
        gradients = torch.autograd.grad(score.sum(), [layer.output for layer in layers], allow_unused=True)
        came = torch.zeros_like(start)  # r (R - I), summed by itself: beside r, small gains would be lost in rounding
        with torch.no_grad(), full_precision(start):
            for layer, gradient in zip(reversed(layers), reversed(gradients), strict=True):
                if gradient is None:
                    raise UserError("the target does not read what a layer of attention makes: use attention_rollout")
                gain = (layer.to_weights(gradient).float() * layer.weights.float()).relu().mean(dim=1)
                came = came + torch.einsum("bi,bij->bj", start + came, gain)
            maps.append(to_map(model, points, came))
    return Attribution(torch.cat(maps))
