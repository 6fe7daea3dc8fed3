"""HiResCAM (Draelos and Carin, 2020, arXiv 2011.08891)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields_and_gradients
from heatssl.attribution.targets import Target


def hirescam(model: nn.Module, images: Tensor, target: Target, *, layer: Layer = None, chunk: int = 64) -> Attribution:
    """A feature map times its gradient, position by position: what Grad-CAM averages stays where it is.

    map = ReLU(sum over c of dy / dA_c * A_c). Where the gradient is the same everywhere, as behind a mean pool, it
    equals Grad-CAM.

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
    maps = [
        (gradient * field).sum(dim=1).relu()
        for field, gradient in fields_and_gradients(model, images, target, layer, chunk)
    ]
    return Attribution(torch.cat(maps))
