"""The maps of ``heatssl attribute`` as one self-contained HTML page: gallery.html in the folder of the maps.

Images stand below each other, methods side by side. Every map is a PNG of 8-bit codes (:mod:`heatssl.report.codes`), so
the page is a table of pictures where no script runs, and reads out values where one does.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from heatssl.errors import UserError, permission_errors
from heatssl.report.colour import lookup_table
from heatssl.report.grids import (
    Arrays,
    Grid,
    checkpoint_grids,
    extrapolation_grid,
    hidden_errors,
    method_grid,
    scores_of,
)
from heatssl.report.page import environment, write_page
from heatssl.report.pictures import UNREADABLE as BROKEN_PICTURE
from heatssl.report.pictures import embed, title_of
from heatssl.report.run_folder import UNREADABLE, weights_of


@dataclass
class Correspondence:
    """Directions of features in 8 bits, for similarities that the page computes."""

    codes: dict[str, str]  # by image: int8 (h, w, D) in base64
    rows: int
    columns: int
    dimensions: int
    share: float  # of the variance that these dimensions hold


@dataclass
class Image:
    """What a row of any grid is headed by."""

    label: str  # its class; the end of its name when that is unknown
    photo: str  # data URI; "" where it must not be passed on
    scores: dict[str, float]


@dataclass
class Gallery:
    """All that the page shows."""

    images: dict[str, Image]  # by name, in the order of the page
    grids: list[Grid]
    correspondence: Correspondence | None


@permission_errors()
def write_gallery(folder: Path) -> Path:
    """Write ``gallery.html`` beside ``attribution.json`` and return its path.

    Raises:
        UserError: when the folder holds no maps, when one is broken, or the page cannot be written.
    """
    source, path = folder / "attribution.json", folder / "gallery.html"
    try:
        gallery = read_gallery(folder.parent, json.loads(source.read_text(encoding="utf-8")))
    except PermissionError:
        raise
    except (*UNREADABLE, *BROKEN_PICTURE, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{source} and what it lists cannot be shown ({error}): move it away and run heatssl attribute again"
        ) from error
    write_page(path, render(folder.resolve().parent.name, gallery))
    return path


def render(name: str, gallery: Gallery) -> str:
    """The whole page."""
    return (
        environment()
        .get_template("gallery.html")
        .render(
            name=name,
            images=gallery.images,
            number={image: index for index, image in enumerate(gallery.images)},
            grids=gallery.grids,
            correspondence=gallery.correspondence,
            scores=sorted({score for image in gallery.images.values() for score in image.scores}),
            image_scores={name: image.scores for name, image in gallery.images.items()},
            palette=base64.b64encode(lookup_table("inferno").tobytes()).decode(),
        )
    )


def read_gallery(run: Path, listed: dict[str, Any]) -> Gallery:
    """Everything that ``attribution.json`` lists, and the arrays beside it."""
    maps, checkpoints = listed["maps"], listed.get("checkpoints", [])
    images: dict[str, Image] = {}
    for entry in [*maps, *checkpoints]:
        photo = entry.get("photo")
        if entry["image"] not in images:
            label = entry["label"] or PurePath(entry["image"]).name
            images[entry["image"]] = Image(label, embed(run, photo) if photo else "", {})
    several = len(set(map(weights_of, maps))) > 1
    for entry in maps:
        aim = f"{title_of(entry)}, {entry['target']}" + (f", {weights_of(entry)}" if several else "")
        images[entry["image"]].scores |= {f"{name} · {aim}": value for name, value in scores_of(entry).items()}
    features, extrapolation = (_arrays(run / "attribution" / f"{name}.npz") for name in ("features", "extrapolation"))
    grids = [method_grid(run, maps, features), *checkpoint_grids(run, checkpoints)]
    if extrapolation is not None:
        grids.append(extrapolation_grid(extrapolation))
        for image, (law, _) in hidden_errors(extrapolation).items():
            images[image].scores["error of the law"] = law
    return Gallery(images, grids, None if features is None else _correspondence(features))


def _correspondence(features: Arrays) -> Correspondence:
    codes = features["codes"]
    encoded = [base64.b64encode(image.tobytes()).decode() for image in codes]
    by_image = dict(zip(features["image"].tolist(), encoded, strict=True))
    _, rows, columns, dimensions = codes.shape
    return Correspondence(by_image, rows, columns, dimensions, float(features["code_share"]))


def _arrays(path: Path) -> Arrays | None:
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}
