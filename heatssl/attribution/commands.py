"""``heatssl attribute``: heatmaps of images as arrays and PNG overlays, a list of them, and their scores."""

import hashlib
import json
import math
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from heatssl.attribution.attribute import explain, full_name
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.checkpoints import at_each_step, check_checkpoints
from heatssl.attribution.extrapolation import write_extrapolation
from heatssl.attribution.features import write_features
from heatssl.attribution.fitness import check_fitness
from heatssl.attribution.method_settings import bases_first, check_used, method_options, options_text, with_source
from heatssl.attribution.of_source import options_of_source
from heatssl.attribution.overlay import picture_of
from heatssl.attribution.photos import read_list, remove_photos, write_photos
from heatssl.attribution.pictures import Pictures, given_pictures, pictures_of_split, pixels
from heatssl.attribution.score_table import markdown, write_scores
from heatssl.attribution.scoring import check_scores, measure_scores
from heatssl.attribution.target_setting import Wish, read_target, with_classifier
from heatssl.config import AttributeConfig
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.source import Source, open_source
from heatssl.files import disk_errors, write_atomically
from heatssl.progress_bar import progress_bar

Options = dict[str, Any]


@dataclass(frozen=True)
class Map:
    """One entry of ``attribution.json``; beside ``file`` lies the raw map, a float32 array (h, w), as .npy."""

    image: str
    label: str  # class name, "" when unknown
    photo: str | None  # what the backbone was shown, a picture relative to the run folder; None: not to be passed on
    method: str
    target: str  # for people
    source: str  # last or best weights of the run, or timm:NAME; "" where the step alone says which
    step: int  # optimiser steps behind the weights
    file: str  # the overlay, relative to the run folder
    completeness_error: float | None
    scores: dict[str, float] | None = None  # of this map, where it was among those scored
    options: str = ""  # of the method, where they are not its own: border=0


@permission_errors()
def run_attribute(config: AttributeConfig) -> Path:
    """Explain some images by every method asked for, write maps and overlays, print the completeness errors.

    Writes ``attribution/NNN_METHOD_TARGET.npy`` and ``.png`` and lists them in ``attribution/attribution.json``; what
    other targets, methods or weights (``best_NNN_METHOD_TARGET.npy``) wrote before stays there, and so do maps of other
    images: where one of them has the name, a hash of the image's stands in the place of NNN. Beside them
    ``features.npz`` and ``extrapolation.npz`` of these images, see :mod:`heatssl.attribution.features` and
    :mod:`heatssl.attribution.extrapolation`.

    Returns:
        The folder of the overlays.

    Raises:
        UserError: on unknown methods, targets or images, a probe that is missing or belongs to other weights, or
            checkpoints that there are not.
    """
    config = replace(config, methods=list(dict.fromkeys(filter(None, map(full_name, config.methods)))))
    if config.count < 1 or config.steps < 1 or config.size < 16:
        raise UserError("count and steps must be at least 1 and size at least 16 pixels")
    check_used(config)
    kept = check_checkpoints(config.run) if config.checkpoints else {}
    source = with_classifier(config, open_source(config, needs_data=not config.images))
    source.backbone.to(source.device).eval()
    pictures = given_pictures(config.images, source) if config.images else pictures_of_split(config, source)
    scoring, given = config.score or bool(config.scores), pictures if config.images else None
    if scoring:
        check_scores(given, source, config)
    wish = read_target(config, source)
    if kept and wish.probe is not None:
        raise UserError(f"target={config.target} needs a probe, which fits one checkpoint only: use target=self")
    of_source = options_of_source(config, source, given)
    check_fitness(wish, pictures, source, config, of_source)
    folder = source.output / "attribution"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if config.over_image:
        pictures = replace(pictures, photos=write_photos(folder, pictures, source.data))
    else:
        remove_photos(folder)
    maps = _explain_all(wish, pictures, source, config, of_source)
    _list_maps(folder / "attribution.json", "maps", maps)  # what is written is listed, whatever becomes of the scores
    if scoring:
        maps = _scored(maps, wish, given, source, config, of_source)
        _list_maps(folder / "attribution.json", "maps", maps)
    seen, step = (pictures.images, pictures.names, config.batch_size), source.info.step
    write_features(folder / "features.npz", source.backbone, *seen, source=source.origin, step=step)
    # The objective that a run keeps is that of the end, and of images as in training.
    run = Path(config.run) if source.kind == "last" and not source.resized else None
    write_extrapolation(folder / "extrapolation.npz", run, *seen)
    of_any_step = {name: value for name, value in of_source.items() if name != "law"}  # a run keeps the last one only
    steps = [
        entry
        for at_step in at_each_step(source, kept)
        for entry in _explain_all(read_target(config, at_step), pictures, at_step, config, of_any_step, kept=True)
    ]
    if steps:
        _list_maps(folder / "attribution.json", "checkpoints", steps)
    print(format_table(maps) + f"\n{len(maps)} heatmaps in {folder}", flush=True)
    return folder


def _explain_all(
    wish: Wish, pictures: Pictures, source: Source, config: AttributeConfig, of_source: Options, *, kept: bool = False
) -> list[Map]:
    """Write the maps of every method; ``kept``: of one of the steps that a run has kept, which file names then say."""
    listed = read_list(source.output / "attribution" / "attribution.json")
    taken = {entry["file"]: entry["image"] for entry in [*listed.get("maps", []), *listed.get("checkpoints", [])]}
    known: dict[str, Tensor] = {}
    written: dict[str, list[Map]] = {}
    for method in progress_bar(bases_first(config.methods), name="heatmaps", unit="method"):
        options = method_options(method, config, of_source)
        found = explain(
            source.backbone,
            pictures.images,
            method,
            wish.of(pictures),
            probe=wish.probe,
            **with_source(method, options, known),
        )
        known[method] = found.maps
        written[method] = _write_maps(method, options, found, wish, pictures, source, config, kept, taken)
    return [entry for method in config.methods for entry in written[method]]


def _write_maps(
    method: str,
    options: Options,
    found: Attribution,
    wish: Wish,
    pictures: Pictures,
    source: Source,
    config: AttributeConfig,
    kept: bool,
    taken: dict[str, str],
) -> list[Map]:
    """One overlay and one array for each image; files that are ``taken`` by another image stay."""
    mark, step = ("", f"_step{source.info.step}") if kept else (source.mark, "")
    changed = options_text(method, options)
    kind = "_".join([method.replace(":", "_"), wish.kind, *re.findall(r"[\w.-]+", changed)])
    errors = [None] * len(found.maps) if found.completeness_error is None else found.completeness_error.tolist()
    shown = pixels(pictures.images, source.data)
    entries = []
    for index, (image, raw) in enumerate(zip(shown, found.maps.float().cpu().numpy(), strict=True)):
        name = pictures.names[index]
        file = f"attribution/{mark}{index:03d}_{kind}{step}.png"
        if taken.get(file, name) != name:
            file = f"attribution/{mark}{hashlib.sha256(name.encode()).hexdigest()[:8]}_{kind}{step}.png"
        picture = picture_of(raw, image if config.over_image else None, size=config.size)
        _write_picture(source.output / file, picture)
        _write_array((source.output / file).with_suffix(".npy"), raw)
        entries.append(
            Map(
                name,
                pictures.labels[index],
                pictures.photos[index] if pictures.photos else None,
                method,
                wish.description,
                "" if kept else source.origin,
                source.info.step,
                file,
                errors[index],
                options=", ".join(filter(None, [changed, source.size])),
            )
        )
    return entries


def _scored(
    maps: list[Map],
    wish: Wish,
    given: Pictures | None,
    source: Source,
    config: AttributeConfig,
    of_source: Options,
) -> list[Map]:
    """Write and print the table of scores; the maps with those of their own."""
    rows, per_image = measure_scores(wish, given, source, config, of_source)
    write_scores(source.output / "attribution", rows)
    print(markdown(rows) + "\n", flush=True)
    return [
        replace(entry, scores={name: value for name, value in found.items() if not math.isnan(value)})
        if (found := per_image.get((entry.method, entry.image)))
        else entry
        for entry in maps
    ]


def _write_picture(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda file: picture.save(file, "PNG"))


def _write_array(path: Path, array: NDArray[np.float32]) -> None:
    write_atomically(path, lambda file: np.save(file, array))


# ---- what is told


def _list_maps(path: Path, name: str, maps: list[Map]) -> None:
    """Add to a list of ``attribution.json``, whole or not at all; an entry of the same file is replaced."""
    before = read_list(path)
    kept = [entry for entry in before.get(name, []) if entry["file"] not in {item.file for item in maps}]
    content = json.dumps(before | {name: kept + [asdict(item) for item in maps]}, indent=2)
    write_atomically(path, lambda file: file.write(content.encode()))


def format_table(maps: list[Map]) -> str:
    """Aligned lines: image, class, method, target, completeness error in percent where there is one."""
    rows = [("image", "class", "method", "target", "completeness error")]
    rows += [
        (
            m.image,
            m.label or "-",
            f"{m.method}, {m.options}" if m.options else m.method,
            m.target.split(":")[0],
            "-" if m.completeness_error is None else f"{m.completeness_error:.2%}",
        )
        for m in maps
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    return "\n".join(
        "  ".join([*(f"{cell:<{width}}" for cell, width in zip(row[:4], widths, strict=True)), f"{row[4]:>18}"])
        for row in rows
    )
