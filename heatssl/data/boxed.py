"""Images with boxes: COCO's format, boxes around masks, or the generated scenes."""

import hashlib
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from heatssl.config import DataConfig
from heatssl.data import coco
from heatssl.data.boxes import Boxes, box_of_mask
from heatssl.data.image_data import ImageData, Split, Subset, balanced_subset, digest
from heatssl.data.layout import root_of
from heatssl.data.masked import open_masked, read_mask
from heatssl.data.open import part_of_train, size_of
from heatssl.data.shapes import Shapes
from heatssl.errors import UserError
from heatssl.progress_bar import progress_bar


@dataclass(frozen=True)
class Boxed:
    """The images of a split, and the boxes of each."""

    images: ImageData
    boxes: list[Boxes]
    classes: list[str]  # of the boxes: a label is a position in this list

    def part(self, indices: NDArray[np.int64]) -> "Boxed":
        """Some images, in this order."""
        return Boxed(Subset(self.images, indices), [self.boxes[i] for i in indices], self.classes)

    def digest(self) -> str:
        """Another one when an image or a box of it is."""
        found = hashlib.sha256(digest(self.images).encode())
        for boxes in self.boxes:
            found.update(b"".join(part.tobytes() for part in boxes) + b";")
        return found.hexdigest()


class Squares(Subset):
    """Whole images stretched to squares: no object is cut off, and boxes in shares stay what they are.

    Args:
        data: the images.
        size: side S in pixels.
        mirror: show every image once more with left and right exchanged: image i as number ``len(data) + i``.
    """

    def __init__(self, data: ImageData, size: int, *, mirror: bool = False) -> None:
        super().__init__(data, np.tile(np.arange(len(data)), 2 if mirror else 1))
        self.size = size

    def load(self, i: int) -> Image.Image:
        """Image i, (S, S) RGB."""
        image = super().load(i).resize((self.size, self.size), Image.Resampling.BILINEAR)
        return ImageOps.mirror(image) if i >= len(self.data) else image


def open_boxed(config: DataConfig, split: Split, mask_value: int = 1) -> Boxed:
    """Open the images of a split that have boxes, and check the layout.

    ``train_size``, ``val_size`` and ``held_out`` are those of :func:`heatssl.data.open_split`.

    Args:
        config: where the images are.
        split: which ones.
        mask_value: where there are masks and no annotations in COCO's format, the box around the pixels of this value
            is the one object of an image.

    Raises:
        UserError: when there are no boxes, or annotations cannot be used; the message names the fix.
    """
    if config.held_out:
        train = open_boxed(replace(config, held_out=0.0), "train", mask_value)
        return train.part(part_of_train(train.images, config, split))
    size = size_of(config, split)
    if config.name == "shapes":
        scenes = Shapes(split, config.image_size, size)
        boxes = [box_of_mask(scenes.mask(i), label) for i, label in enumerate(scenes.labels)]
        return Boxed(scenes, boxes, scenes.classes)
    data = _annotated(config, split) or _masked(config, split, mask_value)
    return data if size is None or size >= len(data.boxes) else data.part(balanced_subset(data.images, size).indices)


def _annotated(config: DataConfig, split: Split) -> Boxed | None:
    """Boxes in COCO's format, None where no file holds any."""
    if config.name not in {"folder", "tar"}:
        raise UserError(f"data={config.name} has no boxes: use data=shapes, data=folder or data=tar")
    read = coco.in_tar if config.name == "tar" else coco.in_folder
    found = read(root_of(config.root, config.name), split)
    return found and Boxed(found[0], found[1].boxes, found[1].classes)


def _masked(config: DataConfig, split: Split, value: int) -> Boxed:
    """The box around one value of each mask."""
    try:
        data = open_masked(config, split)
    except UserError as error:
        lacking = f"{config.root} has no {coco.name_of(split)} in COCO's format"
        raise UserError(f"{lacking}, and boxes cannot be taken from masks: {error}") from error
    numbers = progress_bar(range(len(data)), name=f"masks of {split}")
    boxes = [box_of_mask(read_mask(data, i) == value) for i in numbers]
    if not any(len(each.labels) for each in boxes):
        raise UserError(f"no mask of {split} holds the value {value}: set mask_value to that of the objects")
    return Boxed(data, boxes, ["object"])
