"""Whether the map stays when the image hardly changes."""

from collections.abc import Callable

import torch
from torch import Tensor


def max_sensitivity(
    maps_of: Callable[[Tensor], Tensor], images: Tensor, *, radius: float = 0.02, samples: int = 8, seed: int = 0
) -> Tensor:
    """The largest relative change of the map under noise of at most ``radius`` in every pixel: low is good.

    Yeh et al., NeurIPS 2019 (arXiv 1901.09392), definition 3.1, by Monte Carlo: max over e of |map(x + e) - map(x)|,
    divided by |map(x)| as captum does; Euclidean norms. A map that never changes is perfect here.

    Args:
        maps_of: normalised images (B, 3, H, W) -> maps (B, h, w) of the method; its target stays that of ``images``.
        images: normalised (B, 3, H, W).
        radius: of the noise, uniform, in units of the normalised image.
        samples: of noise, the same for all images.
        seed: of the noise.

    Returns:
        (B,) float32 >= 0.
    """
    generator = torch.Generator().manual_seed(seed)
    before = maps_of(images).float().flatten(1)
    size = before.norm(dim=1)
    size = torch.where(size > 0, size, 1.0)
    worst = torch.zeros_like(size)
    for _ in range(samples):
        noise = radius * (2 * torch.rand(images.shape[1:], generator=generator) - 1)
        after = maps_of(images + noise.to(images)).float().flatten(1)
        worst = torch.maximum(worst, (after - before).norm(dim=1) / size)
    return worst
