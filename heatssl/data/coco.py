"""Boxes in COCO's format: ``annotations/train.json`` beside ``train/``, in a folder or a tar, and so for val.

The format: https://cocodataset.org/#format-data, of which ``images``, ``annotations`` and ``categories`` are read.
"""

import json
import logging
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from heatssl.data import folder, tar
from heatssl.data.boxes import Boxes, as_boxes
from heatssl.data.files import Contents, Files, InFolder, InTar
from heatssl.data.image_data import Split
from heatssl.errors import UserError

IMAGE = ("id", "file_name", "width", "height")
ANNOTATION = ("image_id", "category_id", "bbox")
CATEGORY = ("id", "name")
SLACK = 1.0  # pixels by which a box may reach over the border: annotation tools round

log = logging.getLogger(__name__)


class Instances(NamedTuple):
    """What a file of annotations says, image by image."""

    files: list[str]  # file_name
    sizes: list[tuple[int, int]]  # width, height in pixels
    boxes: list[Boxes]
    classes: list[str]  # names of the categories, in the order of their ids


class Annotated(Files):
    """Images whose annotations say how large they are; one of another size is refused when it is read."""

    def __init__(self, split: Split, names: list[str], contents: Contents, sizes: list[tuple[int, int]]) -> None:
        super().__init__(split, names, contents)
        self._sizes = sizes

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        image = super().load(i)
        if image.size != self._sizes[i]:
            told, found = ("{} x {}".format(*size) for size in (self._sizes[i], image.size))
            raise ValueError(f"the annotations say {told} pixels, the file has {found}")
        return image


def name_of(split: Split) -> str:
    """Where the annotations of a split stand."""
    return f"annotations/{split}.json"


def in_folder(root: str, split: Split) -> tuple[Annotated, Instances] | None:
    """Images and boxes of a split, None when there are no annotations.

    Raises:
        UserError: when annotations cannot be used, or an image is missing.
    """
    base = folder.existing(root)
    path, here = base / name_of(split), base / split
    if not path.is_file():
        return None
    found = read_instances(path.read_bytes(), str(path))
    _check_present(found.files, (name for name in found.files if (here / name).is_file()), path, f"{here}")
    names = [str(here / name) for name in found.files]
    return Annotated(split, names, InFolder(here, found.files), found.sizes), found


def in_tar(root: str, split: Split) -> tuple[Annotated, Instances] | None:
    """The same of a tar."""
    path = tar.existing(root)
    entry = tar.locate(path, name_of(split))
    if entry is None:
        return None
    reader, state = tar.Reader(path), tar.version_of(path)
    where = f"{path.name}:{entry.path}"
    found = read_instances(reader.read(entry.offset, entry.size), where)
    entries = {each.path: each for each in tar.index_of(path, state)[split]}
    _check_present(found.files, entries, where, f"{path.name}:{split}")
    names = [f"{path.name}:{split}/{name}" for name in found.files]
    return Annotated(split, names, InTar(reader, [entries[name] for name in found.files], state), found.sizes), found


def _check_present(wanted: list[str], present: Iterable[str], where: str | Path, place: str) -> None:
    there = set(present)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(
            f"{len(missing)} of {len(wanted)} images of {where} are not in {place}, {missing[0]} first: "
            "put them there, file_name is a path below it, or take them out of the annotations"
        )


def read_instances(content: bytes, where: str) -> Instances:
    """Read a file of annotations and check it.

    A box without area is left out with a warning (COCO's own files hold some), and what reaches over the border by
    less than a pixel is cut off.

    Args:
        content: of the file, JSON.
        where: what to call it in a message.

    Raises:
        UserError: on a missing key, an unknown image or category, a box outside its image, or nothing at all.
    """
    try:
        document = json.loads(content)
    except ValueError as error:
        raise UserError(f"{where} is no JSON ({error}): export it again in COCO's format") from error
    images = _entries(document, "images", IMAGE, where)
    annotations = _entries(document, "annotations", ANNOTATION, where)
    categories = sorted(_entries(document, "categories", CATEGORY, where), key=lambda category: category["id"])
    position, label = _positions(images, "image", where), _positions(categories, "category", where)
    for image in images:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ("width", "height")):
            raise UserError(f"{where}: image {image['id']} needs width and height in pixels, whole and over 0")

    found: list[list[tuple[list[float], int, bool]]] = [[] for _ in images]
    without_area = 0
    for number, annotation in enumerate(annotations):
        name = f"annotation {annotation.get('id', number)} of {where}"
        for key, known, kind in (("image_id", position, "images"), ("category_id", label, "categories")):
            if annotation[key] not in known:
                raise UserError(f"{name} has {key} {annotation[key]}, which {kind} lacks: add it there or remove this")
        row = position[annotation["image_id"]]
        corners = _corners(annotation["bbox"], images[row]["width"], images[row]["height"], name)
        if corners[0] < corners[2] and corners[1] < corners[3]:
            found[row].append((corners, label[annotation["category_id"]], bool(annotation.get("iscrowd", 0))))
        else:
            without_area += 1
    if without_area:
        log.warning("%s: left out %d boxes without area", where, without_area)
    return Instances(
        [str(image["file_name"]) for image in images],
        [(image["width"], image["height"]) for image in images],
        [as_boxes(*zip(*boxes, strict=True)) if boxes else as_boxes([], []) for boxes in found],
        [str(category["name"]) for category in categories],
    )


def _entries(document: Any, key: str, needed: tuple[str, ...], where: str) -> list[dict[str, Any]]:
    """The list behind a key of the document; each of its entries has what is needed, and whole numbers as ids."""
    entries = document.get(key) if isinstance(document, dict) else None
    if not isinstance(entries, list) or not entries:
        state = "lacks" if entries is None else "holds nothing, or no list, as"
        raise UserError(f"{where} {state} {key!r}: it must hold images, annotations and categories as COCO's files do")
    for number, entry in enumerate(entries):
        name = f"{where}: entry {number} of {key!r}"
        lacking = [each for each in needed if not isinstance(entry, dict) or each not in entry]
        if lacking:
            raise UserError(f"{name} lacks {lacking[0]!r}: each needs {', '.join(needed)}")
        odd = [each for each in needed if each.endswith("id") and not isinstance(entry[each], int)]
        if odd:
            raise UserError(f"{name} has the {odd[0]} {entry[odd[0]]!r}: it must be a whole number")
    return entries


def _positions(entries: list[dict[str, Any]], kind: str, where: str) -> dict[int, int]:
    """Id -> position."""
    found = {entry["id"]: number for number, entry in enumerate(entries)}
    if len(found) < len(entries):
        twice = next(entry["id"] for number, entry in enumerate(entries) if found[entry["id"]] != number)
        raise UserError(f"{where} holds {kind} {twice} twice: ids must differ")
    return found


def _corners(box: Any, columns: int, rows: int, name: str) -> list[float]:
    """Left, top, right, bottom as shares of the image, from left, top, width, height in pixels."""
    if not isinstance(box, list) or len(box) != 4 or not all(map(_is_finite, box)):
        raise UserError(f"{name} has the bbox {box}: it must be [left, top, width, height] in pixels")
    left, top, width, height = box
    beyond = max(-left, -top, left + width - columns, top + height - rows)
    if width < 0 or height < 0 or beyond > SLACK:
        raise UserError(
            f"{name}: the bbox {box} reaches outside its image of {columns} x {rows} pixels: "
            "it must be [left, top, width, height], not corners"
        )
    shares = left / columns, top / rows, (left + width) / columns, (top + height) / rows
    return [min(max(share, 0.0), 1.0) for share in shares]


def _is_finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
