"""From a configuration to a data set."""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from heatssl.config import DataConfig
from heatssl.data.folder import Folder
from heatssl.data.image_data import ImageData, Split, Subset, balanced_subset
from heatssl.data.images import Images
from heatssl.data.shapes import Shapes
from heatssl.data.tar import Tar
from heatssl.errors import UserError


def open_split(config: DataConfig, split: Split) -> ImageData:
    """Open train or val of the configured data set and check its layout.

    ``train_size`` and ``val_size`` say how many scenes ``shapes`` paints; of the others they take a
    class-balanced subset, the same one every time. With ``held_out``, val is a class-balanced share of train,
    and train the rest: the real val is not opened.

    Raises:
        UserError: on an unknown name or a layout that cannot work; the message names the fix.
    """
    return chosen(config, split, _whole)


def chosen(config: DataConfig, split: Split, whole: Callable[[DataConfig, Split, int | None], ImageData]) -> ImageData:
    """What the settings leave of a data set.

    Args:
        config: ``held_out``, ``train_size`` and ``val_size``.
        split: which one.
        whole: opens a split, given how many images it has to make, where it makes them.

    Raises:
        UserError: when nothing is left, and what ``whole`` raises.
    """
    place: Split = "train" if config.held_out else split
    size = size_of(config, place)
    data = whole(config, place, size)
    if size is not None and size < len(data):
        data = balanced_subset(data, size)
    return Subset(data, part_of_train(data, config, split)) if config.held_out else data


def _whole(config: DataConfig, split: Split, size: int | None) -> ImageData:
    if config.name == "shapes":
        data = Shapes(split, config.image_size, size)
        if config.expected_classes not in (None, len(data.classes)):
            raise UserError(f"shapes has {len(data.classes)} classes: set data.expected_classes=null")
        return data
    if config.name == "folder":
        return Folder(config.root, split, config.expected_classes, alone=bool(config.held_out))
    if config.name == "tar":
        return Tar(config.root, split, config.expected_classes, alone=bool(config.held_out))
    if config.name == "images":
        if config.expected_classes is not None:
            raise UserError("data=images has no classes: set data.expected_classes=null")
        return Images(config.root, split)
    raise UserError(f"unknown data set {config.name!r}: use data=shapes, data=folder, data=tar or data=images")


def part_of_train(train: ImageData, config: DataConfig, split: Split) -> NDArray[np.int64]:
    """Which images of train are ``train`` and ``val`` where a share of it is held out.

    Raises:
        UserError: when the share leaves either empty.
    """
    count = round(config.held_out * len(train)) if math.isfinite(config.held_out) else 0
    if not 0 < count < len(train):
        raise UserError(f"data.held_out={config.held_out:g} of {len(train)} images splits nothing: use 0.1, or 0")
    held = balanced_subset(train, count).indices
    if split == "train":
        return np.setdiff1d(np.arange(len(train)), held)
    if config.val_size is None or config.val_size >= count:
        return held
    return held[balanced_subset(Subset(train, held), config.val_size).indices]


def size_of(config: DataConfig, split: Split) -> int | None:
    """How many images of a split are asked for; None: all.

    Raises:
        UserError: when that is none.
    """
    size = config.train_size if split == "train" else config.val_size
    if size is not None and size < 1:
        raise UserError(f"data.{split}_size={size} leaves no image: use at least 1, or null for all")
    return size
