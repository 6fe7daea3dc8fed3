"""Small pictures of a finished run for the docs: python tools/figures.py RUN DESTINATION [--no-images].

Writes DESTINATION_curve.png (loss and online kNN), DESTINATION_law.png (image, visible part, what the law fills in,
what the mean alone paints, where it does, residual) and DESTINATION_heatmaps.png (the overlays of ``heatssl
attribute``). With --no-images the law's picture is its residual alone; write the heatmaps by ``heatssl attribute
over_image=false`` then.
"""

import json
import sys
from pathlib import Path

import matplotlib as mpl
import numpy as np
from PIL import Image

mpl.use("Agg")
from matplotlib import pyplot as plt

SIDE = 96  # pixels of one thumbnail
COUNT = 4


def curve(run: Path, destination: Path) -> None:
    """Loss and online kNN accuracy over steps, side by side."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(7, 2.2), dpi=100, layout="constrained")
    for axis, key, title in zip(
        axes, ("train/loss", "knn/accuracy"), ("loss", "online kNN, held out of train"), strict=True
    ):
        points = [(line["step"], line[key]) for line in lines if key in line]
        axis.plot(*zip(*points, strict=True), color="#b8400f", marker="." if key.startswith("knn") else "")
        axis.set(title=title, xlabel="step")
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(f"{destination}_curve.png")


def law(run: Path, destination: Path, images: bool) -> None:
    """One row an image: original, visible part, what is painted, residual of the law; or a row of residuals."""
    pictures = np.load(run / "pictures.npz")
    residual = pictures["law_residual"]
    heat = (plt.get_cmap("inferno")(residual / residual.max())[..., :3] * 255).astype(np.uint8)
    chosen = range(0, len(residual), max(1, len(residual) // COUNT))  # spread over the four corners
    if not images:
        save_grid([[Image.fromarray(cell) for cell in heat]], f"{destination}_law.png")
        return
    shown = [name for name in ("image", "visible", "reconstruction", "from_rest") if name in pictures]
    rows = [[*(pictures[name][i] for name in shown), heat[i]] for i in chosen]
    save_grid([[Image.fromarray(cell) for cell in row] for row in rows[:COUNT]], f"{destination}_law.png")


def heatmaps(run: Path, destination: Path) -> None:
    """One row an image, one column for each method and target."""
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    names = list(dict.fromkeys(entry["image"] for entry in maps))[:COUNT]
    rows: list[list[Image.Image]] = [
        [Image.open(run / entry["file"]) for entry in maps if entry["image"] == name] for name in names
    ]
    save_grid(rows, f"{destination}_heatmaps.png")


def save_grid(rows: list[list[Image.Image]], path: str) -> None:
    """Thumbnails in a grid, with a gap of two pixels."""
    sheet = Image.new("RGB", (len(rows[0]) * (SIDE + 2) - 2, len(rows) * (SIDE + 2) - 2), "white")
    for i, row in enumerate(rows):
        for j, cell in enumerate(row):
            resampling = Image.Resampling.NEAREST if min(cell.size) < SIDE // 2 else Image.Resampling.LANCZOS
            thumbnail = cell.convert("RGB").resize((SIDE, SIDE), resampling)
            sheet.paste(thumbnail, (j * (SIDE + 2), i * (SIDE + 2)))
    sheet.save(path, optimize=True)


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if argument != "--no-images"]
    if len(folders) != 2:
        sys.exit(__doc__)
    run, destination = map(Path, folders)
    curve(run, destination)
    law(run, destination, images="--no-images" not in sys.argv)
    heatmaps(run, destination)
