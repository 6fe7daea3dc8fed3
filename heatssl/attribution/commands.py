"""``heatssl attribute``: heatmaps of a run's images as PNG overlays, and a list of them."""

import json
import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from heatssl.attribution.attribute import explain, find_method, method_options
from heatssl.attribution.overlay import overlay
from heatssl.attribution.pictures import Pictures, given_pictures, pictures_of_split
from heatssl.attribution.score_table import markdown, write_scores
from heatssl.attribution.scoring import measure_scores
from heatssl.attribution.target_setting import Wish, read_target
from heatssl.config import AttributeConfig
from heatssl.data import denormalise
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.source import Source, open_source
from heatssl.export import disk_errors, write_atomically

BRIGHTEST = 0.995  # quantile of a map that gets the brightest colour: one hot pixel must not darken the rest


@dataclass(frozen=True)
class Map:
    """One entry of ``attribution.json``."""

    image: str
    label: str  # class name, "" when unknown
    method: str
    target: str  # for people
    file: str  # relative to the run folder
    completeness_error: float | None
    scores: dict[str, float] | None = None  # of this map, where it was among those scored


@permission_errors()
def run_attribute(config: AttributeConfig) -> Path:
    """Explain some images by every method asked for, write overlays, print the completeness errors.

    Writes ``attribution/NNN_METHOD_TARGET.png`` and lists them in ``attribution/attribution.json``; what
    other targets or methods wrote before stays there.

    Returns:
        The folder of the overlays.

    Raises:
        UserError: on unknown methods, targets or images, or a probe that is missing or belongs to other
            weights.
    """
    for method in config.methods:
        find_method(method)
    if config.count < 1 or config.steps < 1 or config.size < 16:
        raise UserError("count and steps must be at least 1 and size at least 16 pixels")
    source = open_source(config, needs_data=not config.images)
    source.backbone.to(source.device).eval()
    pictures = given_pictures(config.images, source) if config.images else pictures_of_split(config, source)
    wish = read_target(config, source)
    folder = source.output / "attribution"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    maps = [entry for method in config.methods for entry in _explain(method, wish, pictures, source, config)]
    if config.score or config.scores:
        maps = _scored(maps, wish, pictures if config.images else None, source, config)
    _list_maps(folder / "attribution.json", maps)
    print(format_table(maps) + f"\n{len(maps)} heatmaps in {folder}", flush=True)
    return folder


def _explain(method: str, wish: Wish, pictures: Pictures, source: Source, config: AttributeConfig) -> list[Map]:
    options = method_options(method, config.batch_size, config.steps)
    found = explain(source.backbone, pictures.images, method, wish.of(pictures), probe=wish.probe, **options)
    errors = [None] * len(found.maps) if found.completeness_error is None else found.completeness_error.tolist()
    shown = (255 * denormalise(pictures.images, source.data)).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    entries = []
    for index, (image, raw) in enumerate(zip(shown, found.maps.abs().cpu().numpy(), strict=True)):
        largest = float(np.quantile(raw, BRIGHTEST)) or float(raw.max()) or 1.0
        file = f"attribution/{index:03d}_{method}_{wish.kind}.png"
        background = image if config.over_image else None
        _write_picture(source.output / file, overlay(background, raw / largest, size=config.size, largest=largest))
        entries.append(
            Map(pictures.names[index], pictures.labels[index], method, wish.description, file, errors[index])
        )
    return entries


def _scored(maps: list[Map], wish: Wish, given: Pictures | None, source: Source, config: AttributeConfig) -> list[Map]:
    """Write and print the table of scores; the maps with those of their own."""
    rows, per_image = measure_scores(wish, given, source, config)
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


# ---- what is told


def _list_maps(path: Path, maps: list[Map]) -> None:
    """Add to ``attribution.json``, whole or not at all; an entry of the same file is replaced."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["maps"] if path.exists() else []
        kept = [entry for entry in before if entry["file"] not in {item.file for item in maps}]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not a list of heatmaps ({error}): move it away and run the command again"
        ) from error
    content = json.dumps({"maps": kept + [asdict(item) for item in maps]}, indent=2)
    write_atomically(path, lambda file: file.write(content.encode()))


def format_table(maps: list[Map]) -> str:
    """Aligned lines: image, class, method, target, completeness error in percent where there is one."""
    rows = [("image", "class", "method", "target", "completeness error")]
    rows += [
        (
            m.image,
            m.label or "-",
            m.method,
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
