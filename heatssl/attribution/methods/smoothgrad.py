"""SmoothGrad (Smilkov et al., 2017, arXiv 1706.03825)."""

import math

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.points import input_gradient, owners
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


def smoothgrad(
    model: nn.Module,  # noqa: ARG001 - every method has the same signature
    images: Tensor,
    target: Target,
    *,
    samples: int = 32,
    noise: float = 0.15,
    seed: int = 0,
    chunk: int = 64,
) -> Attribution:
    """Saliency of the mean gradient over noisy copies of the image, which leaves out what flickers from copy to copy.

    map = max over colours of |mean over k of dy / dx at x + sigma e_k|, e_k standard normal (section 2.2), the same for
    all images.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: the score y.
        samples: noisy copies of each image.
        noise: sigma, as a share of the range of each image's values; the paper finds 0.1 to 0.2 best.
        seed: of the noise.
        chunk: copies per forward pass.

    Returns:
        Maps (B, H, W) >= 0; no completeness error.

    Raises:
        UserError: on no samples, or noise that is negative or not finite.
    """
    if samples < 1 or not 0 <= noise < math.inf:
        raise UserError(f"smoothgrad needs samples >= 1 and finite noise >= 0, not {samples} and {noise}")
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(samples, *images.shape[1:], generator=generator).to(images)
    sigma = noise * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)))[:, None, None, None]
    total = torch.zeros_like(images, dtype=torch.float32)
    for owner, sample in owners(images, chunk, samples):
        points = images[owner] + sigma[owner] * normal[sample]
        total.index_add_(0, owner, input_gradient(target, points, owner, local=True))
    return Attribution((total / samples).abs().amax(dim=1))
