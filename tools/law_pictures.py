"""One picture for each law, for docs/laws.md: python tools/law_pictures.py [DESTINATION, default docs/images/laws].

Each picture holds a field before and after the law has acted on it and, on one scale of colours, how far the two are
from obeying it.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import torch
from torch import Tensor

from heatssl import heat

mpl.use("Agg")
from matplotlib import pyplot as plt

SIDE = 24  # positions


class Example(NamedTuple):
    """A field (1, C, H, W), what the law makes of it, and the law's residual, (1, C, H, W) -> (1, h, w)."""

    before: Tensor
    after: Tensor
    residual: Callable[[Tensor], Tensor]
    words: tuple[str, str]


def laplace() -> Example:
    """Values on the border, any values inside; then at rest."""
    before = noise(1)
    return Example(
        before, at_rest(before, border(), 1.0), heat.Laplace().residual, ("border held, noise inside", "at rest")
    )


def correlated_laplace() -> Example:
    """The same with heat running four times as well up and down as sideways."""
    law = heat.CorrelatedLaplace(1, coupling="diagonal", boundary="interior")
    law.deviation.data.fill_(3.0)  # S = 4
    before = noise(1)
    return Example(
        before, at_rest(before, border(), 4.0), law.residual, ("border held, noise inside", "at rest, S = 4")
    )


def first_order() -> Example:
    """A quarter that obeys the law beside noise; then the quarter, moved by half a map three times."""
    law = heat.FirstOrder(16)
    one = torch.randn(1, 16, 1, 1)
    columns = [torch.cat([law.propagate(one, x, y) for y in range(SIDE)], dim=2) for x in range(SIDE)]
    whole, half = torch.cat(columns, dim=3), SIDE // 2
    before = noise(16)
    before[..., :half, :half] = quarter = whole[..., :half, :half]
    below = torch.cat([quarter, law.propagate(quarter, dy=half)], dim=2)
    after = torch.cat([below, law.propagate(below, dx=half)], dim=3)
    return Example(before, after, law.residual, ("one quarter, noise elsewhere", "moved by half a map"))


def norm_linear() -> Example:
    """One vector at the centre; then the field that grows from it."""
    law = heat.NormLinear(16, scale=0.3)
    seed = torch.randn(1, 16)
    before = torch.zeros(1, 16, SIDE, SIDE)
    before[..., SIDE // 2, SIDE // 2] = seed
    return Example(before, law.expand(seed, SIDE, SIDE), law.residual, ("one vector", "grown from it"))


def hidden_waves() -> Example:
    """Any field; then a pattern that each column carries one patch further up: speed 1."""
    law = heat.HiddenWaves(2)
    law.speed_parts.data.copy_(torch.tensor([[1.0], [0.0]]))
    before = noise(2)
    line = torch.nn.functional.avg_pool1d(torch.randn(1, 2, 2 * SIDE + 3), 4, stride=1)
    after = torch.stack([line[..., x : x + SIDE] for x in range(SIDE)], dim=3)
    return Example(before, after, law.residual, ("noise", "a wave of speed 1"))


def heat_flow() -> Example:
    """A point, an edge and noise; then after a time of 4 patches squared."""
    law = heat.HeatFlow(1, time=4.0)
    before = 0.3 * noise(1)
    before[..., SIDE // 2 :] += 1
    before[..., SIDE // 2, SIDE // 4] += 8
    return Example(before, law.evolve(before), law.residual, ("time 0", "time 4"))


def completion_steady() -> Example:
    """A quarter of a smooth field, at random places; then heat at rest between them."""
    return completed(
        lambda values, visible: heat.complete(values, steady(visible, torch.ones(1))), "at rest between them"
    )


def completion_kernel() -> Example:
    """The same; then heat that has flowed for one patch squared."""

    def fill(values: Tensor, visible: Tensor) -> Tensor:
        known, wanted = (heat.coordinates(index, SIDE) for index in (visible, everywhere()))
        return heat.complete(values, heat.heat_kernel_weights(known, wanted, torch.ones(1)))

    return completed(fill, "after a time of 1")


def transport() -> Example:
    """A field that obeys z_x = A z, z_y = B z; then in its frame of rest, where it is constant."""
    law = heat.Transport(16)
    positions = heat.coordinates(everywhere(), SIDE)
    rest = torch.randn(1, 1, 16).expand(-1, SIDE**2, -1)
    turning = law.from_rest(rest, positions)
    before, after = (
        values.transpose(1, 2).unflatten(2, (SIDE, SIDE)) for values in (turning, law.to_rest(turning, positions))
    )
    return Example(before, after, heat.Copy(16).residual, ("obeys the law", "in its frame of rest"))


def noise(channels: int) -> Tensor:
    return torch.randn(1, channels, SIDE, SIDE)


def everywhere() -> Tensor:
    """Row-major indices (1, H W)."""
    return torch.arange(SIDE**2)[None]


def border() -> Tensor:
    """Row-major indices (1, n) of the outermost positions."""
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[1:-1, 1:-1] = True
    return (~inside).flatten().nonzero().T


def steady(visible: Tensor, anisotropy: Tensor) -> Tensor:
    return heat.harmonic_weights(visible, everywhere(), (SIDE, SIDE), anisotropy)


def at_rest(before: Tensor, visible: Tensor, anisotropy: float) -> Tensor:
    """The Dirichlet problem with smooth values held at visible positions, which ``before`` is given as well."""
    angle = torch.atan2(*(heat.coordinates(everywhere(), SIDE)[0] - (SIDE - 1) / 2).T.flip(0))
    values = torch.stack([torch.sin(2 * angle), torch.cos(2 * angle)], dim=1)[None]  # two halves: one complex channel
    before.flatten(2)[..., visible[0]] = values[:, visible[0], :1].transpose(1, 2)
    filled = heat.complete(values[:, visible[0]], steady(visible, torch.tensor([anisotropy])))
    return filled[..., :1].transpose(1, 2).unflatten(2, (SIDE, SIDE))


def completed(fill: Callable[[Tensor, Tensor], Tensor], word: str) -> Example:
    """A quarter of a smooth field's positions, and the field that ``fill`` makes of them."""
    smooth = heat.heat_semigroup(5 * noise(2), 3.0)
    visible = torch.randperm(SIDE**2)[None, : SIDE**2 // 4]
    before = torch.zeros_like(smooth)
    before.flatten(2)[..., visible[0]] = smooth.flatten(2)[..., visible[0]]
    after = fill(smooth.flatten(2)[..., visible[0]].transpose(1, 2), visible).transpose(1, 2).unflatten(2, (SIDE, SIDE))
    return Example(before, after, heat.Laplace(boundary="replicate").residual, ("a quarter is visible", word))


EXAMPLES = (
    laplace,
    correlated_laplace,
    first_order,
    norm_linear,
    hidden_waves,
    heat_flow,
    completion_steady,
    completion_kernel,
    transport,
)


def draw(example: Example, path: Path) -> None:
    """Before, its residual, after, its residual: the first channel, colours shared between each two."""
    fields = (example.before, example.after)
    residuals = [example.residual(field)[0] for field in fields]
    reach = max(field[0, 0].abs().quantile(0.99).item() for field in fields)
    hottest = max(residual.max().item() for residual in residuals)
    figure, axes = plt.subplots(1, 4, figsize=(8, 2.2), dpi=100, layout="constrained")
    for column, (field, residual, word) in enumerate(zip(fields, residuals, example.words, strict=True)):
        axes[2 * column].imshow(field[0, 0], cmap="RdBu_r", vmin=-reach, vmax=reach)
        axes[2 * column].set_title(word, fontsize=9)
        axes[2 * column + 1].imshow(residual, cmap="inferno", vmin=0, vmax=hottest)
        axes[2 * column + 1].set_title(f"residual, mean {residual.mean():.2g}", fontsize=9)
    for axis in axes:
        axis.set_axis_off()
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    folder = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/laws")
    folder.mkdir(parents=True, exist_ok=True)
    for make in EXAMPLES:
        torch.manual_seed(0)
        with torch.no_grad():
            draw(make(), folder / f"{make.__name__}.png")
