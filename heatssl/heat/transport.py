"""The commuting first-order law in its own coordinates: a field that obeys it is constant but for known turns.

Where A and B of z_x = A z, z_y = B z commute, a shared basis makes them diagonal, and the solution is
z(p) = exp(x g_x + y g_y) u with u the same everywhere. Dividing by the exponential, position by position, takes
any field into the law's frame of rest, where obeying the law means being constant, and any law of heat may be
applied to what is left. The basis itself is left out: the linear map that makes the field can hold it.
"""

import math

import torch
from torch import Tensor, nn

from heatssl.ops import turn


class Transport(nn.Module):
    """Turns and decays per patch of C/2 complex channels; channels k and k + C/2 are one complex number.

    Args:
        channels: C, even.
        max_decay: bound on |decay| per patch.
        max_rotation: rotations start evenly spread over +- this angle, in radians per patch.

    Raises:
        ValueError: on an odd number of channels.
    """

    def __init__(self, channels: int, max_decay: float = 0.1, max_rotation: float = math.pi / 8) -> None:
        super().__init__()
        if channels < 2 or channels % 2:
            raise ValueError(f"transport needs an even number of channels, not {channels}")
        self.channels = channels
        self.max_decay = max_decay
        self.raw_decay = nn.Parameter(torch.zeros(2, channels // 2))
        self.rotation = nn.Parameter(max_rotation * (2 * torch.rand(2, channels // 2) - 1))

    def no_weight_decay(self) -> set[str]:
        """Parameters that nothing should pull to zero, where the law would be a copy."""
        return {"raw_decay", "rotation"}

    def to_rest(self, values: Tensor, positions: Tensor) -> Tensor:
        """Values (B, n, C) at positions (B, n, 2), x before y in patches, times exp(-(x g_x + y g_y))."""
        return self._turn(values, -positions)

    def from_rest(self, values: Tensor, positions: Tensor) -> Tensor:
        """Inverse of :meth:`to_rest`."""
        return self._turn(values, positions)

    def _turn(self, values: Tensor, offset: Tensor) -> Tensor:
        x, y = offset.to(self.rotation).split(1, dim=-1)  # no matrix product: autocast would round the angles
        decay = self.max_decay * torch.tanh(self.raw_decay)
        modulus = torch.exp(x * decay[0] + y * decay[1])
        return turn(values, modulus, x * self.rotation[0] + y * self.rotation[1], dim=-1)

    def extra_repr(self) -> str:
        return f"channels={self.channels}"
