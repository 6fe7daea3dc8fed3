"""Accuracy against time for every objective, for README and docs: python tools/objectives_chart.py [DESTINATION].

From benchmarks/results/objectives.jsonl: kNN on the way of runs that looked at it; then kNN and
linear probe of Benchmark A, on Imagenette at the learning rate of the recipe and on the scenes.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
RATE = "optimizer.learning_rate=4e-3"
PLAIN = "objective.target=plain"
NAMES = {"mae, light decoder": "mae", "heat_jepa, transport": "heat_jepa + law"}
ORDER = ["heat_jepa + law", "heat_jepa", "heat_completion", "mae", "simclr", "simmim", "lejepa", "qb_heat", "finola"]
COLOURS = dict(zip(ORDER, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]


def on_the_way(axis: Axes) -> None:
    """Online kNN over the processor's time, one line for each objective, named at its end."""
    lines = {
        name_of(row): row["knn_on_the_way"]
        for row in rows("imagenette", minutes=2.5)
        if row.get("knn_on_the_way") and RATE in row["settings"]
    }
    ends = {}
    for objective, line in lines.items():
        seconds, accuracy = zip(*line, strict=True)
        axis.plot([each / 60 for each in seconds], [100 * each for each in accuracy], ".-", color=COLOURS[objective])
        ends[objective] = (seconds[-1] / 60, 100 * accuracy[-1])
    name_apart(axis, ends)
    axis.set(title="Imagenette, on the way", xlabel="minutes of one core", ylabel="kNN, %")


def at_the_end(axis: Axes, data: str) -> None:
    """Accuracies by kNN and linear probe, one row for each objective: mean, least and most of its runs."""
    groups = sorted(by_objective(data).items(), key=lambda group: mean(row["linear"] for row in group[1]))
    for height, (objective, group) in enumerate(groups):
        for metric, marker in (("knn", "o"), ("linear", "D")):
            values = [100 * row[metric] for row in group]
            axis.plot([min(values), max(values)], [height, height], color=COLOURS[objective], linewidth=1)
            axis.plot(mean(values), height, marker, color=COLOURS[objective])
    labels = [f"{objective} ({len(group)})" for objective, group in groups]
    axis.set_yticks(range(len(groups)), labels, fontsize=8)
    axis.grid(axis="x", linewidth=0.3)
    axis.set(xlabel="● kNN   ◆ linear probe, %   (runs in brackets)")


def by_objective(data: str) -> dict[str, list[dict[str, Any]]]:
    """Runs of Benchmark A on val: at the recipe's rate on Imagenette, with plain pixels where MAE paints scenes.

    Of Imagenette those of each objective's last commit.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows(data, minutes=10):
        if row["split"] != "val" or "images_per_second" in row or row.get("encoder") != "vit":
            continue
        if RATE in row["settings"] if data == "imagenette" else name_of(row) != "mae" or PLAIN in row["settings"]:
            group = groups.setdefault(name_of(row), [])
            if data == "imagenette" and group and group[-1]["commit"] != row["commit"]:
                group.clear()  # of an objective that has changed since then
            group.append(row)
    return groups


def name_of(row: dict[str, Any]) -> str:
    return NAMES.get(row["objective"], row["objective"])


def rows(data: str, minutes: float) -> Iterator[dict[str, Any]]:
    for line in (RESULTS / "objectives.jsonl").read_text().splitlines():
        row = json.loads(line)
        if (row["data"], row["minutes"]) == (data, minutes) and (data == "shapes" or "AMD" in row["hardware"]):
            yield row


def name_apart(axis: Axes, points: dict[str, tuple[float, float]], gap: float = 0.055) -> None:
    """Write each name to the right of its point, moved up where it would lie on the name below."""
    low, high = axis.get_ylim()
    below = -float("inf")
    for name, (x, y) in sorted(points.items(), key=lambda point: point[1][1]):
        below = max(y, below + gap * (high - low))
        axis.annotate(f"  {name}", (x, below), va="center", fontsize=8, color=COLOURS[name], annotation_clip=False)


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/objectives.png")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 3.6), dpi=100, layout="constrained")
    on_the_way(left)
    left.set_xlim(0, 7)
    left.set_xticks(range(6))
    at_the_end(middle, "imagenette")
    middle.set(title="Imagenette, 10 minutes of two cores, val")
    at_the_end(right, "shapes")
    right.set(title="Generated scenes, the same time, val")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(destination, metadata={"Software": None})
