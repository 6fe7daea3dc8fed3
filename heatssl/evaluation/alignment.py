"""Features of images at another size, moved to where they lie at the size that a classifier was trained at.

FixRes (arXiv:1906.06423) showed that the statistics of pooled features depend on the size of images, and trains the
last layers again. Ours asks for no label and trains no layer: what a size does to features is linear for the most part.
"""

import torch
from torch import Tensor, nn

from heatssl.errors import UserError
from heatssl.evaluation.checks import is_finite


class Alignment(nn.Module):
    """z -> mean here + (I + D)(z - mean there): features (N, C) of one size -> where they lie at the other, float32.

    D is the ridge regression, from what features of images show at one size, of what the other size changes in them:
    it minimises the sum over images of |here - mean here - (I + D)(there - mean there)|^2, and ridge v |D|^2, with v
    the mean variance of a channel there. A large ridge leaves the difference of the means alone.

    Args:
        there: features (N, C) of N images, at the size that is new to the classifier.
        here: features (N, C) of the same images in the same order, at the size that the classifier knows. 500
            images do, 2,000 do better; their labels are not asked for.
        ridge: over 0; weighs as much as so many images for each direction in which the size changes nothing.

    Raises:
        UserError: when the features are not of the same images or not finite, or the ridge is not over 0.
    """

    mean_there: Tensor
    mean_here: Tensor
    change: Tensor

    def __init__(self, there: Tensor, here: Tensor, ridge: float = 15.0) -> None:
        if there.ndim != 2 or there.shape != here.shape or len(there) < 2:
            raise UserError(
                f"features must be (N, C) of the same two or more images at both sizes, not {tuple(there.shape)} and "
                f"{tuple(here.shape)}"
            )
        if not (is_finite(there) and is_finite(here)):
            raise UserError("features that are not finite cannot be aligned: look at the backbone with heatssl health")
        if not 0 < ridge < float("inf"):
            raise UserError(f"ridge={ridge:g} must be over 0 and finite")
        super().__init__()
        there, here = there.double(), here.double()
        mean_there, mean_here = there.mean(dim=0), here.mean(dim=0)
        seen, wanted = there - mean_there, here - mean_here
        variance = seen.square().mean().clamp_min(torch.finfo(torch.float32).tiny)
        penalty = ridge * variance * torch.eye(seen.shape[1], dtype=seen.dtype, device=seen.device)
        change = torch.linalg.solve(seen.T @ seen + penalty, seen.T @ (wanted - seen))
        self.register_buffer("mean_there", mean_there.float())
        self.register_buffer("mean_here", mean_here.float())
        self.register_buffer("change", change.float())

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, C) of images at the new size -> as at the size that the classifier knows (N, C)."""
        centred = features.float() - self.mean_there
        return centred + centred @ self.change + self.mean_here
