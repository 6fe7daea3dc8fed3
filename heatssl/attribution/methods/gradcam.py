"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391), for convolutional and token models."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields_and_gradients
from heatssl.attribution.targets import Target


def gradcam(model: nn.Module, images: Tensor, target: Target, *, layer: Layer = None, chunk: int = 64) -> Attribution:
    """Channels of a feature map, weighted by the mean of their gradient.

    alpha_c = mean over positions of dy / dA_c (eq. 1), map = ReLU(sum over c of alpha_c A_c) (eq. 2).

    Of the final map of a mean-pooled target this is the exact share of each position in the score, rectified:
    the gradient is the same everywhere.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: what to explain.
        layer: whose output is used, see :func:`heatssl.attribution.layers.fields_and_gradients`.
        chunk: images per forward pass.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: on a layer that is not there, does not take part, or has no grid of positions.
    """
    maps = [
        (gradient.mean(dim=(2, 3), keepdim=True) * field).sum(dim=1).relu()
        for field, gradient in fields_and_gradients(model, images, target, layer, chunk)
    ]
    return Attribution(torch.cat(maps))
