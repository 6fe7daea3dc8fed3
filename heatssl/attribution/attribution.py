"""What an attribution method returns."""

from typing import NamedTuple

from torch import Tensor


class Attribution(NamedTuple):
    """Raw maps of one method.

    Attributes:
        maps: (B, h, w), at the method's own resolution.
        completeness_error: (B,), how far the sum of the map is from what it should sum to, as a share of it;
            None for methods that promise no sum.
    """

    maps: Tensor
    completeness_error: Tensor | None = None


def completeness_error(shares: Tensor, rise: Tensor) -> Tensor:
    """How far shares (B, ...) are from summing to the rise (B,) of the score, as a share of it: -> (B,) float64."""
    total = shares.double().flatten(1).sum(dim=1)
    return (total - rise).abs() / rise.abs().clamp_min(1e-12)
