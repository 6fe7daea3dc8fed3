"""Grad-CAM++ (Chattopadhyay et al., WACV 2018, arXiv 1710.11063)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields_and_gradients
from heatssl.attribution.targets import Target


def gradcam_plus_plus(
    model: nn.Module, images: Tensor, target: Target, *, layer: Layer = None, chunk: int = 64
) -> Attribution:
    """Channels of a feature map, weighted by their positive gradients, so that small objects of a class count as well.

    weight_c = sum over positions of alpha ReLU(g), map = ReLU(sum over c of weight_c A_c), with the gradient g of the
    score y and alpha = g^2 / (2 g^2 + g^3 sum of A_c) (eq. 19, for exp(y)): here 1 / (2 + g sum of A_c), which no
    small gradient upsets.

    The derivation is for maps that are nowhere negative, such as those behind a ReLU. The sum of a channel that is
    negative, as in token models, counts as zero: else a weight could have any size.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: what to explain.
        layer: whose output is used, see :func:`heatssl.attribution.layers.fields_and_gradients`.
        chunk: images per forward pass.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: as :func:`heatssl.attribution.methods.gradcam.gradcam`.
    """
    maps = []
    for field, gradient in fields_and_gradients(model, images, target, layer, chunk):
        gain = gradient.relu()
        total = field.sum(dim=(2, 3), keepdim=True).relu()
        weight = (gain / (2 + gain * total)).sum(dim=(2, 3), keepdim=True)
        maps.append((weight * field).sum(dim=1).relu())
    return Attribution(torch.cat(maps))
