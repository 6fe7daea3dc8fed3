"""Tables of maps for the gallery: methods, checkpoints, and what a law makes of a quarter."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from heatssl.report.codes import BRIGHTEST, Coded, code_colours, code_map
from heatssl.report.pictures import inside, title_of
from heatssl.report.run_folder import is_number, weights_of

REACH = 2.5  # deviations of a principal component within which colours differ
Arrays = dict[str, np.ndarray]


@dataclass
class Cell:
    """One map of one image."""

    alt: str
    coded: Coded
    over_photo: bool = True  # false: colours that stand on their own
    note: str = ""  # shown below it
    link: str = ""  # the full-size picture, relative to the page
    box: str = ""  # CSS of the frame around the visible quarter


@dataclass
class Column:
    """What the maps below each other have in common."""

    name: str
    detail: str = ""
    weights: str = ""  # whose maps they are


@dataclass
class Grid:
    """A table of maps: a row for each image, a cell for each column or None."""

    key: str  # of its section in the page
    title: str
    lead: str
    columns: list[Column]
    rows: dict[str, list[Cell | None]]  # by image


def method_grid(run: Path, entries: list[dict[str, Any]], features: Arrays | None) -> Grid:
    """Every method and target that ``attribution.json`` lists, and the features as colours where they are there.

    Maps of other weights have columns of their own: those of the best step, and those that are left of an earlier one.
    """
    keys = [(*_column(entry), weights_of(entry)) for entry in entries]
    columns = {key: Column(*key) for key in keys}
    details = [", ".join(filter(None, key[1:])) for key in keys]
    cells = {
        (entry["image"], key): _heatmap(run, entry, detail)
        for entry, key, detail in zip(entries, keys, details, strict=True)
    }
    colours = {} if features is None else _colour_cells(features)
    images = dict.fromkeys([*(entry["image"] for entry in entries), *colours])
    rows = {image: [cells.get((image, key)) for key in columns] for image in images}
    lead = (
        "Where in each image the target comes from. A map is dark at 0 and brightest at the magnitude that only its "
        "largest half per cent exceeds; the pointer reads its values, signs included."
    )
    if features is not None:
        held = ", ".join(f"{100 * share:.0f}" for share in features["colour_share"])
        lead += (
            " Features: the first three principal components of the final maps of all these images together, as red, "
            f"green and blue. They hold {held}\u00a0% of the variance; values are in standard deviations."
        )
        columns[("features", "", "")] = Column("features", "principal components", _weights_of_features(features))
        for image, row in rows.items():
            row.append(colours.get(image))
    return Grid("methods", "Heatmaps", lead, list(columns.values()), rows)


def checkpoint_grids(run: Path, entries: list[dict[str, Any]]) -> list[Grid]:
    """For each method and target the maps of the same image by the weights of one step after the other."""
    grids = []
    for number, (method, target) in enumerate(dict.fromkeys(map(_column, entries))):
        here = [entry for entry in entries if _column(entry) == (method, target)]
        steps = sorted({entry["step"] for entry in here})
        cells = {(entry["image"], entry["step"]): _heatmap(run, entry, f"step {entry['step']}") for entry in here}
        rows = {
            image: [cells.get((image, step)) for step in steps] for image in dict.fromkeys(e["image"] for e in here)
        }
        lead = (
            f"The same images by the weights that the run has kept on its way; target {target}. "
            "Each map has a range of its own."
        )
        columns = [Column(f"step {step}") for step in steps]
        grids.append(Grid(f"checkpoints{number}", f"{method} across checkpoints", lead, columns, rows))
    return grids


def extrapolation_grid(arrays: Arrays) -> Grid:
    """Features of the whole image, what the law makes of one quarter's, and the distance between them."""
    hidden = ~arrays["visible"]
    brightest = float(np.quantile(arrays["error"][hidden], BRIGHTEST)) if hidden.any() else 1.0
    rows: dict[str, list[Cell | None]] = {}
    for i, (image, (law, mean)) in enumerate(hidden_errors(arrays).items()):
        box = _box(arrays["visible"][i])
        rows[image] = [
            Cell(f"features of all of {image}", _coloured(arrays["seen"][i]), over_photo=False),
            Cell(f"the law's features of {image}", _coloured(arrays["filled"][i]), over_photo=False, box=box),
            Cell(
                f"error of the law on {image}",
                code_map(arrays["error"][i], brightest),
                note=f"law {law:.2f}, mean {mean:.2f}",
                box=box,
            ),
        ]
    lead = (
        "The encoder sees the framed quarter alone, and the law says what the features must be elsewhere. The error is "
        "the squared distance to the features of the whole image, over their variance: 1 is as far off as the mean of "
        "all images. Below it: its mean over hidden positions, and that of the quarter's mean, which knows no law. The "
        f"brightest colour stands for {brightest:.2g} in every image."
    )
    columns = [
        Column("features", "all of the image seen"),
        Column("features", "a quarter seen, the law"),
        Column("error"),
    ]
    return Grid("extrapolation", "What the law makes of a quarter", lead, columns, rows)


def hidden_errors(arrays: Arrays) -> dict[str, tuple[float, float]]:
    """By image, the mean error over hidden positions: of the law, and of the quarter's mean."""
    found = zip(arrays["image"].tolist(), ~arrays["visible"], arrays["error"], arrays["error_of_mean"], strict=True)
    return {image: (float(law[hidden].mean()), float(mean[hidden].mean())) for image, hidden, law, mean in found}


def scores_of(entry: dict[str, Any]) -> dict[str, float]:
    """Scores of one entry of ``attribution.json`` by name: its ``scores``, and the completeness error."""
    found = {**(entry.get("scores") or {}), "completeness_error": entry.get("completeness_error")}
    return {name.replace("_", " "): float(value) for name, value in found.items() if is_number(value)}


def _column(entry: dict[str, Any]) -> tuple[str, str]:
    return title_of(entry), str(entry["target"])


def _heatmap(run: Path, entry: dict[str, Any], detail: str) -> Cell | None:
    """The raw map beside the picture; None where an older heatssl has left none."""
    file = inside(run, entry["file"])
    raw = file.with_suffix(".npy")
    if not raw.exists():
        return None
    values = np.load(raw, allow_pickle=False)
    note = ", ".join(f"{name} {value:.3g}" for name, value in scores_of(entry).items())
    alt = f"{title_of(entry)} of {entry['label'] or entry['image']}, {detail}"
    return Cell(alt, code_map(values), entry["photo"] is not None, note, file.name)


def _colour_cells(features: Arrays) -> dict[str, Cell]:
    pairs = zip(features["image"].tolist(), features["colours"], strict=True)
    return {image: Cell(f"features of {image}", _coloured(colours), over_photo=False) for image, colours in pairs}


def _weights_of_features(features: Arrays) -> str:
    if "source" not in features:  # an older heatssl
        return ""
    return weights_of({"source": str(features["source"]), "step": int(features["step"])})


def _coloured(colours: np.ndarray) -> Coded:
    return code_colours(colours, [-REACH] * 3, [REACH] * 3)


def _box(visible: np.ndarray) -> str:
    """CSS of the rectangle that a mask (h, w) shows."""
    rows, columns = np.flatnonzero(visible.any(axis=1)), np.flatnonzero(visible.any(axis=0))
    share = {
        "top": rows[0] / len(visible),
        "left": columns[0] / len(visible[0]),
        "height": len(rows) / len(visible),
        "width": len(columns) / len(visible[0]),
    }
    return ";".join(f"{side}:{100 * value:g}%" for side, value in share.items())
