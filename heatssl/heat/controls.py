"""Controls: what stands in for a law so that a table can say what the law itself brings. All of them are ours.

Each can move a field as a first-order law can, but states no differential equation: ``Copy`` moves nothing,
``FreeLinear`` has one unrelated matrix per offset, ``MultilayerPerceptron`` is told the offset.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heatssl.heat.law import Propagator, apply_matrix
from heatssl.ops import full_precision

Offset = tuple[int, int]


class Copy(Propagator):
    """What stands at an offset is what stands here: z_x = 0, z_y = 0. No parameters, no cost, any real offset."""

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:  # noqa: ARG002 - whatever the offset
        """The field itself, (B, C, H, W) -> same."""
        return zeta


class FreeLinear(Propagator):
    """One free matrix per offset: z(p + offset) = M_offset z(p), nothing relating the matrices to each other.

    Parameters: C^2 for each offset; a move costs C^2 multiply-adds per position, as one of full matrices does.

    Args:
        channels: C.
        offsets: the (dx, dy) in whole patches that the field can be moved by, beside (0, 0).

    Raises:
        ValueError: without any offset, or on one that is a fraction of a patch.
    """

    def __init__(self, channels: int, offsets: Sequence[Offset]) -> None:
        super().__init__(channels)
        if any(step != int(step) for offset in offsets for step in offset):
            raise ValueError(f"free matrices move by whole patches, not by {list(offsets)}")
        self.offsets = sorted({(int(dx), int(dy)) for dx, dy in offsets} - {(0, 0)})
        if not self.offsets:
            raise ValueError("a free linear map needs offsets to move by, such as [(1, 0), (0, 1)]")
        # As near the identity as the full matrices of FirstOrder start; weight decay pulls towards a copy, as theirs.
        self.deviations = nn.Parameter(0.02 * torch.randn(len(self.offsets), channels, channels) / math.sqrt(channels))

    def matrix(self, offset: Offset) -> Tensor:
        """M (C, C) of one offset."""
        identity = torch.eye(self.channels, dtype=self.deviations.dtype, device=self.deviations.device)
        return identity + self.deviations[self.offsets.index(offset)]

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """The field moved by one of the known offsets, (B, C, H, W) -> same.

        Raises:
            ValueError: on another offset.
        """
        if dx == 0 and dy == 0:
            return zeta
        if (dx, dy) not in self.offsets:
            known = ", ".join(map(str, self.offsets))
            raise ValueError(f"no free matrix moves by ({dx}, {dy}): its offsets are {known}")
        return apply_matrix(self.matrix((int(dx), int(dy))), zeta)

    def residual(self, z: Tensor) -> Tensor:
        """Squared error of predicting each position from those at minus the known offsets, mean over channels and them.

        Args:
            z: field (B, C, H, W).

        Returns:
            (B, H, W); 0 where no offset leads to from within the field.
        """
        self.enter(z)
        height, width = z.shape[2:]
        total, count = z.new_zeros(len(z), height, width), z.new_zeros(height, width)
        for dx, dy in self.offsets:
            if abs(dx) >= width or abs(dy) >= height:
                continue
            source = (..., _inside(-dy, height), _inside(-dx, width))
            target = (..., _inside(dy, height), _inside(dx, width))
            with full_precision(z):
                total[target] = total[target] + (z[target] - self.move(z[source], dx, dy)).square().mean(dim=1)
            count[target] += 1
        return total / count.clamp_min(1)

    def loss(self, z: Tensor) -> Tensor:
        """Mean of :meth:`residual`, which repeats nothing: (B, C, H, W) -> scalar."""
        return self.residual(z).mean()

    def extra_repr(self) -> str:
        return f"channels={self.channels}, offsets={self.offsets}"


class MultilayerPerceptron(Propagator):
    """z(p + offset) = z(p) + network(z(p), offset), the same network for all positions and offsets.

    Parameters, and multiply-adds per position of a move: about 2 C hidden + (depth - 1) hidden^2, for a hidden width
    of C and depth 1 twice those of a matrix. Any real offset; no move undoes another.

    Args:
        channels: C.
        hidden: width of the hidden layers; None: C.
        depth: hidden layers, at least 1, each followed by GELU.
        reach: offset in patches that the network sees as 1; choose the longest that will be asked for.

    Raises:
        ValueError: when hidden, depth or reach is not positive.
    """

    def __init__(self, channels: int, hidden: int | None = None, depth: int = 1, reach: float = 8.0) -> None:
        super().__init__(channels)
        hidden = channels if hidden is None else hidden
        if hidden < 1 or depth < 1 or reach <= 0:
            raise ValueError(f"hidden={hidden}, depth={depth} and reach={reach} must all be positive")
        self.reach = reach
        self.from_offset = nn.Linear(2, hidden, bias=False)  # added to the first layer: one product for all positions
        layers: list[nn.Module] = [nn.Linear(channels, hidden)]
        for _ in range(depth - 1):
            layers += [nn.GELU(), nn.Linear(hidden, hidden)]
        self.first, *rest = layers
        leave = nn.Linear(hidden, channels)
        self.rest = nn.Sequential(*rest, nn.GELU(), leave)
        with torch.no_grad():  # near a copy at the start, as the laws are
            leave.weight.mul_(0.1)
            leave.bias.zero_()

    def move(self, zeta: Tensor, dx: float = 0, dy: float = 0) -> Tensor:
        """The field moved by any offset, (B, C, H, W) -> same."""
        if dx == 0 and dy == 0:
            return zeta
        return self.move_each(zeta.movedim(1, -1), zeta.new_tensor([dx, dy])).movedim(-1, 1)

    def move_each(self, zeta: Tensor, offsets: Tensor) -> Tensor:
        """Each vector moved by an offset of its own: (..., C), offsets (..., 2) in patches -> (..., C), broadcast."""
        vectors = zeta.to(next(self.parameters()).dtype)
        moved = vectors + self.rest(self.first(vectors) + self.from_offset(offsets.to(vectors.dtype) / self.reach))
        return moved.to(zeta.dtype)


def _inside(offset: int, size: int) -> slice:
    """Positions along an axis that lie inside both the field and the field moved by an offset."""
    return slice(max(offset, 0), size + min(offset, 0))
