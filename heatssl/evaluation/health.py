"""Health of frozen features without labels: are they many, do they tell images apart, what do they look at?

Nothing here is an accuracy. A figure means something beside that of another checkpoint on the same images.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import evaluation_mode, feature_map
from heatssl.progress_bar import progress_bar

FIELDS = 16  # images whose receptive field is computed at a time


def effective_rank(eigenvalues: Tensor) -> Tensor:
    """Exp of the entropy of eigenvalues (C,) as shares of their sum: 1 for one of them, C for C equal ones."""
    shares = eigenvalues.clamp_min(0) / eigenvalues.clamp_min(0).sum().clamp_min(1e-30)
    return torch.exp(-torch.special.xlogy(shares, shares).sum())


def lidar(views: Tensor, ridge: float = 1e-4) -> Tensor:
    """LiDAR (arXiv 2312.04000): effective rank of what separates images, measured by what varies within one.

    The eigenvalues are those of S_w^(-1/2) S_b S_w^(-1/2), S_b the covariance between the means of images, S_w that of
    views about their image's mean, plus ``ridge`` times its mean variance (the paper adds a constant; this one does
    not depend on the scale of features).

    Args:
        views: features (N, Q, C) of Q views of each of N images, Q at least 2.
        ridge: see above.

    Returns:
        scalar in [1, C].

    Raises:
        ValueError: on fewer than two images or views.
    """
    images, per_image, width = views.shape
    if images < 2 or per_image < 2:
        raise ValueError(f"lidar needs two images or more, and two views of each, not {images} and {per_image}")
    views = views.double()
    means = views.mean(dim=1)
    within = (views - means[:, None]).flatten(0, 1)
    between = means - means.mean(dim=0)
    inner = within.T @ within / (images * (per_image - 1))
    inner = inner + ridge * inner.diagonal().mean() * torch.eye(width, dtype=inner.dtype, device=inner.device)
    variance, basis = torch.linalg.eigh(inner)
    whitened = between @ (basis / variance.clamp_min(1e-30).sqrt())
    return effective_rank(torch.linalg.svdvals(whitened).square()).float()


def alignment(first: Tensor, second: Tensor) -> Tensor:
    """Mean squared distance of two views of the same images, (N, C) each, on the unit sphere (arXiv 2005.10242, eq. 2).

    Lower is closer; 0 to 4, and 2 for views that have nothing in common.
    """
    return (F.normalize(first.float(), dim=1) - F.normalize(second.float(), dim=1)).square().sum(dim=1).mean()


def uniformity(features: Tensor, sharpness: float = 2.0) -> Tensor:
    """Log of the mean Gaussian potential of all pairs of (N, C) on the unit sphere (arXiv 2005.10242, eq. 3).

    Lower is more evenly spread; 0 when all are the same.
    """
    unit = F.normalize(features.double(), dim=1)
    squared = torch.pdist(unit).square()
    return (torch.logsumexp(-sharpness * squared, dim=0) - torch.log(torch.tensor(float(len(squared))))).float()


def linear_cka(first: Tensor, second: Tensor) -> Tensor:
    """Similarity of two representations of the same images, (N, C) and (N, D) (arXiv 1905.00414, eq. 4 and 5).

    1 where one is a rotation and a multiple of the other, 0 where they share nothing.
    """
    x, y = (features.double() - features.double().mean(dim=0) for features in (first, second))
    shared = (x.T @ y).square().sum()
    own = (x.T @ x).square().sum().sqrt() * (y.T @ y).square().sum().sqrt()
    return (shared / own.clamp_min(1e-30)).float()


def receptive_field(backbone: nn.Module, images: Tensor, *, progress: bool = False) -> Tensor:
    """What the middle position of the map looks at (arXiv 1701.04128): mean absolute gradient on the pixels.

    Args:
        backbone: any timm model; runs in evaluation mode.
        images: normalised (B, 3, S, S).
        progress: show a bar on a terminal once the work has taken two seconds.

    Returns:
        (S, S), summing to one.
    """
    seen = images.new_zeros(images.shape[2:])
    generator = torch.Generator().manual_seed(0)
    parts = progress_bar(images.split(FIELDS), name="receptive field", unit="batch", shown=progress)
    with evaluation_mode(backbone), torch.enable_grad():
        for part in parts:
            pixels = part.detach().clone().requires_grad_()
            maps = feature_map(backbone, pixels)
            middle = maps[:, :, maps.shape[2] // 2, maps.shape[3] // 2]
            # A random direction of features: the plain sum is what a norm at the end keeps constant.
            direction = torch.randn(middle.shape, generator=generator).to(middle)
            (gradient,) = torch.autograd.grad((middle * direction).sum(), pixels)
            seen += gradient.abs().sum(dim=(0, 1))
    return seen / seen.sum().clamp_min(1e-30)


def area_holding(share: float, field: Tensor) -> float:
    """The smallest share of pixels that holds such a share of a receptive field (S, S); ``share`` if all are alike."""
    ordered = field.flatten().sort(descending=True).values.cumsum(dim=0)
    return (int((ordered < share * ordered[-1] * (1 - 1e-6)).sum()) + 1) / len(ordered)
