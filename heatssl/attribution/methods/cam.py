"""Class activation maps (Zhou et al., CVPR 2016, arXiv 1512.04150)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import fields_and_gradients, reads_class_token
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


def cam(model: nn.Module, images: Tensor, target: Target, *, chunk: int = 64) -> Attribution:
    """The final map, weighted by how the score depends on the mean over its positions.

    map = sum over c of w_c A_c (eq. 2), with the weights w of the class in the model's classifier or in a probe; for
    an embedding, the unit vector that the cosine is taken with, over the norm of the image's own. The mean of the map
    is the score without its bias (eq. 1). Where something stands between the mean and the score, such as a norm, w is
    the derivative at the image.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: a score of the mean over positions.
        chunk: images per forward pass.

    Returns:
        Signed maps (B, h, w); no completeness error.

    Raises:
        UserError: when the score reads a class token, or pools the map in another way than by its mean.
    """
    unfit = "cam needs a score of the mean over positions: use method='gradcam', or pass probe= or an embedding"
    if target.uses_classifier and reads_class_token(model):
        raise UserError(f"this classifier reads the class token, {unfit}")
    maps = []
    for field, gradient in fields_and_gradients(model, images, target, None, chunk):
        mean = gradient.mean(dim=(2, 3), keepdim=True)
        if (gradient - mean).abs().amax() > 1e-2 * mean.abs().amax():
            raise UserError(f"this model weights positions unequally, {unfit}")
        maps.append((mean * field).sum(dim=1) * field[0, 0].numel())
    return Attribution(torch.cat(maps))
