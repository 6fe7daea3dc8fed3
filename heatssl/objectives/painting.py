"""Making pixels: of a field position by position, and of a picture's mean, which a law carries to every position. Ours.

The mean over an image's positions is what most evaluations keep of it, and what its heat is at rest, in a body that
loses none. Where A and B of z_x = A z, z_y = B z commute, one vector u at rest is a whole field,

    z(p) = exp(x g_x + y g_y) u,

and each complex channel of u the coefficient of one wave with a wavelength of its own. So a mean that a law carries
back to the positions, and a small painter there, can show what lay where, as coefficients of a series do. Nothing but
the mean is known to it: what the picture needs must be in the mean.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice
from heatssl.heat import MultilayerPerceptron, Transport, coordinates

RestLaw = Literal["commuting", "table", "mlp", "free", "copy"]


def painter(channels: int, width: int, outputs: int) -> nn.Module:
    """Field to pixels, position by position: (B, m, channels) -> (B, m, outputs)."""
    if width == 0:
        return nn.Linear(channels, outputs)
    return nn.Sequential(nn.Linear(channels, width), nn.GELU(), nn.Linear(width, outputs))


class RestPainter(nn.Module):
    """Heat at rest -> law -> painter: means (B, D) -> patches (B, m, outputs).

    Args:
        features: D.
        channels: width of the field.
        grid: rows and columns of patches.
        painter_width: hidden channels of the painter; 0: it is linear.
        outputs: numbers of a patch.
        law: ``commuting``; or a control in its place: ``table`` adds a learned vector to each position, as decoders
            with position embeddings do, ``mlp`` is a small network of the mean and the position, ``free`` has a matrix
            for each position, ``copy`` says the same everywhere.

    Raises:
        ValueError: on an unknown law, or an odd number of channels.
    """

    def __init__(
        self,
        features: int,
        channels: int,
        grid: tuple[int, int],
        painter_width: int,
        outputs: int,
        law: RestLaw = "commuting",
    ) -> None:
        super().__init__()
        check_choice("rest_law", law, get_args(RestLaw))
        self.grid = grid
        positions = grid[0] * grid[1]
        self.to_rest = nn.Linear(features, channels)
        self.transport = Transport(channels) if law == "commuting" else None
        self.table = nn.Parameter(0.02 * torch.randn(positions, channels)) if law == "table" else None
        self.network = MultilayerPerceptron(channels, reach=max(grid) / 2) if law == "mlp" else None
        self.maps = nn.Parameter(torch.randn(positions, channels, channels) * channels**-0.5) if law == "free" else None
        self.painter = painter(channels, painter_width, outputs)

    def no_weight_decay(self) -> set[str]:
        """A table of positions, as in timm's backbones."""
        return {"table"}

    def forward(self, means: Tensor, index: Tensor) -> Tensor:
        """Means (B, D), row-major indices of patches (B, m) -> those patches (B, m, outputs)."""
        return self.painter(self.everywhere(self.to_rest(means), index))

    def everywhere(self, rest: Tensor, index: Tensor) -> Tensor:
        """The field of heat at rest (B, C) at patches (B, m), carried there by the law or its control: (B, m, C)."""
        if self.maps is not None:
            return torch.einsum("bc,bmcd->bmd", rest, self.maps[index])
        if self.network is not None:
            return self.network.move_each(rest[:, None], centred_positions(index, self.grid))
        field = carry_rest(rest, index, self.grid, self.transport)
        return field if self.table is None else field + self.table[index]


def carry_rest(rest: Tensor, index: Tensor, grid: tuple[int, int], transport: Transport | None) -> Tensor:
    """What heat at rest (B, C) is at patches (B, m), (B, m, C): without a law, the same everywhere."""
    spread = rest[:, None].expand(-1, index.shape[1], -1)
    return spread if transport is None else transport.from_rest(spread, centred_positions(index, grid))


def centred_positions(index: Tensor, grid: tuple[int, int]) -> Tensor:
    """Row-major indices (...) -> positions (..., 2), x before y, in patches from the middle: decays stay balanced."""
    middle = torch.tensor([grid[1] - 1, grid[0] - 1], device=index.device) / 2
    return coordinates(index, grid[1]) - middle
