"""Principal components of features, in an order and with signs that do not depend on the machine."""

from typing import NamedTuple

import torch
from torch import Tensor


class Components(NamedTuple):
    """The directions in which vectors vary most."""

    mean: Tensor  # (C,)
    directions: Tensor  # (D, C), orthonormal rows
    variance: Tensor  # (D,), descending
    total: Tensor  # scalar: the variance of all directions together

    @property
    def share(self) -> Tensor:
        """Share of the variance that each direction holds, (D,) in [0, 1]; 0 where nothing varies."""
        return self.variance / self.total.clamp_min(torch.finfo(self.total.dtype).tiny)

    def coordinates(self, field: Tensor) -> Tensor:
        """A field (N, C, h, w) about the mean, along the directions: (N, h, w, D) float64."""
        return (field.double().movedim(1, -1) - self.mean) @ self.directions.T


def principal_components(field: Tensor, count: int) -> Components:
    """The first principal components of a field's positions, all images together.

    Of the two signs of a direction the one is taken that makes its largest entry positive.

    Args:
        field: (N, C, h, w), prefix tokens left out.
        count: directions D, at most C.

    Returns:
        components in float64.
    """
    vectors = field.double().movedim(1, -1).flatten(0, 2)
    mean = vectors.mean(dim=0)
    centred = vectors - mean
    # C x C: the positions of many images are far more than the channels.
    variance, directions = torch.linalg.eigh(centred.T @ centred / len(vectors))
    variance, directions = variance.flip(0).clamp_min(0), directions.T.flip(0)
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    directions = directions * largest.sign()
    return Components(mean, directions[:count], variance[:count], variance.sum())
