"""Accuracy against time for every objective, for docs/recipe.md: python tools/objectives_chart.py [DESTINATION].

From benchmarks/results/objectives.jsonl: kNN on the way of runs that looked at it; then linear probe over
kNN of Benchmark A on Imagenette and on the scenes.
"""

import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib as mpl

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"
EARLIER = ", 3/8 visible"  # the default of heat_jepa when most of its rows were made
RATE = ", rate 4e-3"
PLAIN = "objective.target=plain"
NAMES_OF_DATA = {"imagenette": "Imagenette", "shapes": "the scenes"}
NAMES = ["heat_jepa, transport", "heat_jepa", "heat_completion", "mae, light decoder", "simclr"]
NAMES += ["simmim", "lejepa", "qb_heat", "mae, light decoder, normalised", "finola"]
COLOURS = dict(zip(NAMES, plt.get_cmap("tab10").colors, strict=False))  # type: ignore[attr-defined]


def on_the_way(axis: Axes) -> None:
    """Online kNN over the processor's time, one line for each objective."""
    lines = {
        row["objective"]: row["knn_on_the_way"]
        for row in rows("objectives.jsonl")
        if row.get("knn_on_the_way") and (row["data"], row["minutes"]) == ("imagenette", 2.5)
        if "optimizer.learning_rate=4e-3" in row["settings"]
    }
    for objective in sorted(lines, key=lambda name: -lines[name][-1][1]):
        seconds, accuracy = zip(*lines[objective], strict=True)
        minutes = [each / 60 for each in seconds]
        axis.plot(minutes, [100 * each for each in accuracy], marker=".", label=objective, color=COLOURS[objective])
    axis.set(title="Imagenette on the way, rate 4e-3, one seed", xlabel="minutes of one core", ylabel="kNN, %")
    axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def at_the_end(axis: Axes, data: str) -> None:
    """Linear probe over kNN, one point for each objective; on the scenes those that paint plain pixels say nothing."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows("objectives.jsonl"):
        of_benchmark_a = "images_per_second" not in row and row.get("encoder") in (None, "vit")
        if of_benchmark_a and [row[key] for key in ("data", "minutes", "split")] == [data, 10, "val"]:
            groups.setdefault(name_of(row, data), []).append(row)
    for objective, group in groups.items():
        knn, linear = (100 * mean(row[key] for row in group) for key in ("knn", "linear"))
        axis.plot(
            knn,
            linear,
            "D" if RATE in objective else "o",
            color=COLOURS.get(objective, COLOURS[group[0]["objective"]]),
            fillstyle="full" if objective in COLOURS else "none",  # a setting that is not the objective's own
            label=f"{objective} ({len(group)} seed{'s' if len(group) > 1 else ''})",
        )
    axis.set(title=f"Benchmark A, val: {NAMES_OF_DATA[data]}", xlabel="kNN, %", ylabel="linear probe, %")
    if groups:
        axis.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=2)


def name_of(row: dict[str, Any], data: str) -> str:
    """The objective, and what its row has that the objective of today would not have by itself."""
    name = row["objective"]
    if name.startswith("heat_jepa") and not any("visible_ratio" in each for each in row["settings"]):
        name += EARLIER
    if "objective.rest_weight=0" in row["settings"]:
        name += ", rest_weight=0"
    if "optimizer.learning_rate=4e-3" in row["settings"]:
        name += RATE
    if data == "shapes" and row["objective"].startswith("mae") and PLAIN not in row["settings"]:
        name += ", normalised"
    return str(name)


def rows(file: str) -> list[dict[str, Any]]:
    path = RESULTS / file
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


if __name__ == "__main__":
    destination = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/images/objectives.png")
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 4.4), dpi=100, layout="constrained")
    on_the_way(left)
    at_the_end(middle, "imagenette")
    at_the_end(right, "shapes")
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(destination, metadata={"Software": None})
