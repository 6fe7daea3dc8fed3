"""LayerCAM (Jiang et al., IEEE Transactions on Image Processing 30, 2021, 10.1109/TIP.2021.3089943)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields_and_gradients
from heatssl.attribution.targets import Target


def layercam(model: nn.Module, images: Tensor, target: Target, *, layer: Layer = None, chunk: int = 64) -> Attribution:
    """A feature map, each position of each channel weighted by its own gradient where that is positive.

    map = ReLU(sum over c of ReLU(dy / dA_c) * A_c). Made for layers far from the end, whose gradient differs from
    position to position; name one with ``layer``.

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
        (gradient.relu() * field).sum(dim=1).relu()
        for field, gradient in fields_and_gradients(model, images, target, layer, chunk)
    ]
    return Attribution(torch.cat(maps))
