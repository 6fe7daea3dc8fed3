"""The blocks of vit, gau, flash and roformer_v2 side by side, for docs/backbones.md.

python tools/backbone_figure.py [DESTINATION, default docs/images/backbones.png]
"""

import sys
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

COLOURS = {"linear": "#dbe7f5", "mix": "#f8dcc4", "point": "#e7e7e7", "norm": "#dcefd8"}
HEIGHT = 0.62


class Box(NamedTuple):
    """One step: what it says, its kind, the middle and width of its place, and its row from the bottom."""

    words: str
    kind: str
    x: float
    width: float
    row: float


class Drawing(NamedTuple):
    """A block: boxes, arrows between them by index, and from which row to which a residual runs."""

    title: str
    boxes: list[Box]
    arrows: list[tuple[int, int]]
    residuals: list[tuple[float, float]]


def vit() -> Drawing:
    """Timm's block, as a reference."""
    names = [
        ("layer norm", "norm"),
        ("linear: q, k, v of each head", "linear"),
        ("softmax(q kᵀ) v", "mix"),
        ("linear", "linear"),
        ("layer norm", "norm"),
        ("linear to 4 d, GELU", "linear"),
        ("linear", "linear"),
    ]
    return column("vit block, positions in a table", names, [(-0.5, 3.5), (3.5, 6.5)])


def roformer() -> Drawing:
    """RoFormerV2's block."""
    names = [
        ("linear: q, k, v of each head", "linear"),
        ("q, k turned by row and column", "point"),
        ("softmax(f q kᵀ) v", "mix"),
        ("linear", "linear"),
        ("RMS norm, no parameters", "norm"),
        ("linear to 4 d, GELU; linear", "linear"),
        ("RMS norm, no parameters", "norm"),
    ]
    return column("roformer_v2 block, no biases", names, [(-0.5, 3.5), (4.5, 5.5)])


def column(title: str, names: list[tuple[str, str]], residuals: list[tuple[float, float]]) -> Drawing:
    """Boxes one above the other."""
    boxes = [Box(words, kind, 2, 2.8, row) for row, (words, kind) in enumerate(names)]
    return Drawing(title, boxes, [(row, row + 1) for row in range(len(boxes) - 1)], residuals)


def gau() -> Drawing:
    """One gated attention unit."""
    boxes = [
        Box("RMS norm", "norm", 2, 3.6, 0),
        Box("linear; SiLU but for V", "linear", 2, 3.6, 1),
        Box("gate U\n(n, e = 2d)", "point", 0.75, 1.1, 2.5),
        Box("values V\n(n, e)", "point", 1.9, 0.9, 2.5),
        Box("z (n, s)", "point", 3.1, 1.3, 2),
        Box("q, k: scaled by\nchannel, turned", "point", 3.1, 1.3, 3.15),
        Box("A = softmax(f q kᵀ)\nor  relu(f q kᵀ)² / n", "mix", 3.1, 1.7, 4.35),
        Box("U * (A V₁, V₂), V₁ of s channels", "mix", 1.6, 2.4, 5.4),
        Box("linear", "linear", 1.6, 2.4, 6.3),
    ]
    return Drawing(
        "gau unit, two for each vit block",
        boxes,
        [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (5, 6), (6, 7), (2, 7), (3, 7), (7, 8)],
        [(-0.5, 6.8)],
    )


def flash() -> Drawing:
    """One unit with mixed chunk attention."""
    boxes = [
        Box("RMS norm", "norm", 2, 3.6, 0),
        Box("linear; SiLU but for V", "linear", 2, 3.6, 1),
        Box("gate U\n(n, e = 2d)", "point", 0.75, 1.1, 2.5),
        Box("values V\n(n, e)", "point", 2, 1.1, 2.5),
        Box("z (n, s)", "point", 3.25, 1.1, 2),
        Box("two q, two k", "point", 3.25, 1.1, 3),
        Box("in each chunk\nof 16 x 16: A V₁", "mix", 1.85, 1.25, 4.3),
        Box("across chunks:\nq (kᵀ V₁) / n", "mix", 3.25, 1.3, 4.3),
        Box("U * (near + far, V₂)", "mix", 1.7, 2.6, 5.4),
        Box("linear", "linear", 1.7, 2.6, 6.3),
    ]
    return Drawing(
        "flash unit, two for each vit block",
        boxes,
        [(0, 1), (1, 2), (1, 3), (1, 4), (4, 5), (5, 6), (5, 7), (3, 6), (3, 7), (6, 8), (7, 8), (2, 8), (8, 9)],
        [(-0.5, 6.8)],
    )


def draw(axis: Axes, drawing: Drawing) -> None:
    """Boxes from below upwards, arrows, residuals on the left."""
    for box in drawing.boxes:
        lines = box.words.count("\n") + 1
        height = HEIGHT + 0.2 * (lines - 1)
        axis.add_patch(
            FancyBboxPatch(
                (box.x - box.width / 2, box.row - height / 2),
                box.width,
                height,
                boxstyle="round,pad=0,rounding_size=0.08",
                facecolor=COLOURS[box.kind],
                edgecolor="#444444",
                linewidth=0.8,
            )
        )
        axis.text(box.x, box.row, box.words, ha="center", va="center", fontsize=7.5)
    for start, end in drawing.arrows:
        below, above = drawing.boxes[start], drawing.boxes[end]
        x = min(max(below.x, above.x - above.width / 2 + 0.2), above.x + above.width / 2 - 0.2)
        x_below = min(max(x, below.x - below.width / 2 + 0.1), below.x + below.width / 2 - 0.1)
        arrow = {"arrowstyle": "-|>", "lw": 0.8, "color": "#444444", "shrinkA": 0, "shrinkB": 0}
        rise = [(HEIGHT + 0.2 * box.words.count("\n")) / 2 for box in (below, above)]
        axis.annotate("", (x, above.row - rise[1]), (x_below, below.row + rise[0]), arrowprops=arrow)
    for leaves, joins in drawing.residuals:
        flow = min(drawing.boxes, key=lambda box: abs(box.row - joins)).x
        axis.plot([2, -0.15, -0.15, flow], [leaves, leaves, joins, joins], color="#444444", linewidth=0.8, zorder=0)
        axis.plot(flow, joins, "o", color="white", markeredgecolor="#444444", markersize=9, markeredgewidth=0.8)
        axis.text(flow, joins - 0.015, "+", ha="center", va="center", fontsize=9)
    line = {"arrowstyle": "-|>", "lw": 0.8, "color": "#444444", "shrinkB": 0}
    last = drawing.boxes[-1]
    top = last.row + HEIGHT / 2
    axis.annotate("", (last.x, top + 0.45), (last.x, top), arrowprops=line)
    axis.annotate("", (2, -HEIGHT / 2), (2, -0.8), arrowprops=line)
    axis.set(xlim=(-0.3, 4.05), ylim=(-0.9, 7.2))
    axis.set_title(drawing.title, fontsize=9)
    axis.axis("off")


def main(destination: Path) -> None:
    """Four panels in one picture."""
    figure, axes = plt.subplots(1, 4, figsize=(15, 5.2), constrained_layout=True)
    for axis, drawing in zip(axes, (vit(), roformer(), gau(), flash()), strict=True):
        draw(axis, drawing)
    figure.savefig(destination, dpi=110)
    print(f"-> {destination}")


if __name__ == "__main__":
    default = Path(__file__).resolve().parent.parent / "docs" / "images" / "backbones.png"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
