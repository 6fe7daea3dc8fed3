"""``heatssl attribute``: heatmaps of a run's images as PNG overlays, and a list of them."""

import difflib
import inspect
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from heatssl.attribution.attribute import explain, find_method
from heatssl.attribution.overlay import overlay
from heatssl.attribution.targets import embed
from heatssl.config import AttributeConfig
from heatssl.data import balanced_subset, denormalise, eval_loader, normalise, open_split
from heatssl.data.crop import centre_crop
from heatssl.data.decode import decode
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation import LinearProbe, load_probe
from heatssl.evaluation.source import Source, fingerprint, open_source
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


@dataclass(frozen=True)
class Pictures:
    """The images to explain."""

    images: Tensor  # normalised (B, 3, S, S), on the device of the backbone
    names: list[str]
    labels: list[str]  # class names, "" when unknown


@dataclass(frozen=True)
class Wish:
    """What the setting ``target`` stands for."""

    kind: str  # part of the file names: self, probe, class or image
    description: str
    value: str | Tensor
    probe: LinearProbe | None = None


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
    source = open_source(config)
    source.backbone.to(source.device).eval()
    pictures = _given_pictures(config.images, source) if config.images else _pictures_of_val(config, source)
    wish = _wish(config.target, pictures, source)
    folder = source.output / "attribution"
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    maps = [entry for method in config.methods for entry in _explain(method, wish, pictures, source, config)]
    _list_maps(folder / "attribution.json", maps)
    print(format_table(maps) + f"\n{len(maps)} heatmaps in {folder}", flush=True)
    return folder


def _explain(method: str, wish: Wish, pictures: Pictures, source: Source, config: AttributeConfig) -> list[Map]:
    options: dict[str, Any] = {"chunk": config.batch_size}
    if "steps" in inspect.signature(find_method(method)).parameters:
        options["steps"] = config.steps
    found = explain(source.backbone, pictures.images, method, wish.value, probe=wish.probe, **options)
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


def _write_picture(path: Path, picture: Image.Image) -> None:
    write_atomically(path, lambda file: picture.save(file, "PNG"))


# ---- which images


def _pictures_of_val(config: AttributeConfig, source: Source) -> Pictures:
    """``count`` readable images of val, spread over its classes."""
    val = open_split(source.data, "val")
    chosen = balanced_subset(val, config.count, config.seed)
    # So few images are read faster without starting workers.
    loader = eval_loader(chosen, replace(source.data, workers=0), batch_size=config.count)
    (batch,) = loader
    if not len(batch.images):
        raise UserError(
            f"none of the chosen images can be read, the first is {batch.bad[0]}: choose others with images=[...]"
        )
    names = [chosen.name(index) for index in batch.indices.tolist()]
    labels = [val.classes[label] for label in batch.labels.tolist()]
    return Pictures(normalise(batch.images.to(source.device), source.data), names, labels)


def _given_pictures(paths: Sequence[str], source: Source) -> Pictures:
    """Image files, cropped and scaled like those of val."""
    return Pictures(
        torch.cat([_read(path, source) for path in paths]), [str(path) for path in paths], [""] * len(paths)
    )


def _read(path: str, source: Source) -> Tensor:
    """One image file -> normalised (1, 3, S, S)."""
    try:
        image = decode(Path(path).read_bytes())
    except Exception as error:
        raise UserError(f"image {path} cannot be read ({error}): give the path of a JPEG or PNG file") from error
    pixels = centre_crop(image, source.data.image_size)[None]
    return normalise(pixels.to(source.device), source.data)


# ---- which target


def _wish(target: str, pictures: Pictures, source: Source) -> Wish:
    if target == "self":
        return Wish("self", "self: cosine to the image's own embedding", "self")
    file = source.output / "probe.safetensors"
    if target != "probe" and Path(target).is_file():
        with torch.no_grad():
            reference = embed(source.backbone, _read(target, source))[0]
        return Wish("image", f"image: cosine to the embedding of {Path(target).name}", reference)
    if target != "probe" and not file.exists():
        raise UserError(
            f"target={target} is no file, and classes need a probe: "
            f"run `heatssl probe run={source.name}` first, or use target=self"
        )
    probe, classes = load_probe(file, fingerprint(source.backbone))
    probe = probe.to(source.device)
    if target == "probe":
        return Wish("probe", "probe: logit of the image's class", _labels(pictures, classes, probe, source), probe)
    if target not in classes:
        nearest = difflib.get_close_matches(target, classes, n=1, cutoff=0.0)[0]
        raise UserError(
            f"target={target} is neither a file nor a class: did you mean {nearest!r}? Or use self or probe"
        )
    label = torch.full((len(pictures.names),), classes.index(target), device=source.device)
    return Wish(f"class{classes.index(target)}", f"probe: logit of {target}", label, probe)


def _labels(pictures: Pictures, classes: list[str], probe: LinearProbe, source: Source) -> Tensor:
    """The known class of each image, else the one that the probe predicts: (B,)."""
    with torch.no_grad():
        predicted = probe.logits(embed(source.backbone, pictures.images)).argmax(dim=1).tolist()
    known = [classes.index(label) if label in classes else None for label in pictures.labels]
    chosen = [guess if index is None else index for index, guess in zip(known, predicted, strict=True)]
    return torch.tensor(chosen, device=source.device)


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
