"""Images with a mask each: ``masks/train/x/1.png`` beside ``train/x/1.jpg``, in a folder or a tar; scenes have theirs.

Classes of the images play no part: val may have others than train.
"""

import io
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from heatssl.config import DataConfig
from heatssl.data import folder, tar
from heatssl.data.decode import shown_size
from heatssl.data.files import Contents, Files, InFolder, InTar
from heatssl.data.image_data import ImageData, Split, Subset
from heatssl.data.layout import root_of
from heatssl.data.open import chosen
from heatssl.data.shapes import Shapes
from heatssl.errors import UserError

LAYOUT = "train/**/*.jpg, val/**/*.jpg and, of the same names, masks/train/**/*.png, masks/val/**/*.png"


class MaskedData(ImageData, Protocol):
    """Images, each with a class for every pixel; all have the label 0."""

    def mask(self, i: int) -> NDArray[np.uint8]:
        """Classes (H, W) of image i, of the size of the image; raises what the decoder raises."""


class Masked(Files):
    """Files in pairs.

    Args:
        split: which one.
        names: of the images, to tell of them.
        images, masks: the files.
    """

    def __init__(self, split: Split, names: Sequence[str], images: Contents, masks: Contents) -> None:
        super().__init__(split, names, images)
        self._masks = masks

    def version(self, i: int) -> str:
        """What changes when image i does, or its mask."""
        return f"{super().version(i)} {self._masks.version(i)}"

    def mask(self, i: int) -> NDArray[np.uint8]:
        """Classes of image i; a mask is one channel of whole numbers below 256, or a palette."""
        picture: Image.Image = Image.open(io.BytesIO(self._masks.read(i)))
        values = np.asarray(picture)
        if values.ndim != 2 or values.dtype.kind not in "bui" or values.max(initial=0) > 255:
            raise ValueError(f"the mask of {self.name(i)} is {picture.mode}, not one channel of classes below 256")
        if values.shape != shown_size(self._contents.read(i))[::-1]:
            raise ValueError(f"the mask of {self.name(i)} has another size than its image")
        return values.astype(np.uint8)


class MaskedShapes(Shapes):
    """The generated scenes: 1 where the object is."""

    def mask(self, i: int) -> NDArray[np.uint8]:  # type: ignore[override]
        """Classes of scene i."""
        return super().mask(i).astype(np.uint8)


class MaskedSubset(Subset):
    """What settings leave of images with masks."""

    def mask(self, i: int) -> NDArray[np.uint8]:
        """Classes of image i."""
        data, index = self.data, int(self.indices[i])
        while isinstance(data, Subset):
            index = int(data.indices[index])
            data = data.data
        found: NDArray[np.uint8] = data.mask(index)  # type: ignore[attr-defined]  # see open_masked
        return found


def open_masked(config: DataConfig, split: Split) -> MaskedData:
    """Open the images of a split that have masks, check the layout, and leave what the settings leave.

    ``train_size``, ``val_size`` and ``held_out`` are those of :func:`heatssl.data.open_split`.

    Raises:
        UserError: when there is no mask, or an image has none; the message names the fix.
    """
    data = chosen(config, split, _whole)
    return MaskedSubset(data.data, data.indices) if isinstance(data, Subset) else data  # type: ignore[return-value]


def has_masks(config: DataConfig, split: Split) -> bool:
    """Whether a split has any: nothing is said about their being complete, see :func:`open_masked`."""
    place: Split = "train" if config.held_out else split
    if config.name == "folder":
        return (folder.existing(root_of(config.root, "folder")) / "masks" / place).is_dir()
    if config.name == "tar":
        path = tar.existing(root_of(config.root, "tar"))
        return bool(tar.index_of(path, tar.version_of(path), "masks")[place])
    return config.name == "shapes"


def _whole(config: DataConfig, split: Split, size: int | None) -> MaskedData:
    if config.name == "shapes":
        return MaskedShapes(split, config.image_size, size)
    if config.name == "tar":
        return _in_tar(root_of(config.root, "tar"), split)
    if config.name == "folder":
        return _in_folder(root_of(config.root, "folder"), split)
    raise UserError(f"data={config.name} has no masks: use data=shapes, data=folder or data=tar")


def read_mask(data: MaskedData, i: int) -> NDArray[np.uint8]:
    """The mask (H, W) of image i.

    Raises:
        UserError: when it cannot be used, naming the image.
    """
    try:
        return data.mask(i)
    except (OSError, ValueError) as error:
        raise UserError(f"the mask of {data.name(i)} cannot be used ({error}): repair it or take it out") from error


def _in_tar(root: str, split: Split) -> Masked:
    path = tar.existing(root)
    version = tar.version_of(path)
    images, masks = (
        {entry.path: entry for entry in tar.index_of(path, version, below)[split]} for below in ("", "masks")
    )
    pairs = _pairs(f"{path}:", split, list(images), list(masks))
    reader = tar.Reader(path)
    return Masked(
        split,
        [f"{path.name}:{split}/{image}" for image, _ in pairs],
        InTar(reader, [images[image] for image, _ in pairs], version),
        InTar(reader, [masks[mask] for _, mask in pairs], version),
    )


def _in_folder(root: str, split: Split) -> Masked:
    base = folder.existing(root)
    here, there = base / split, base / "masks" / split
    images, masks = (folder.images_below(place) if place.is_dir() else [] for place in (here, there))
    pairs = _pairs(f"{base}/", split, images, masks)
    return Masked(
        split,
        [str(here / image) for image, _ in pairs],
        InFolder(here, [image for image, _ in pairs]),
        InFolder(there, [mask for _, mask in pairs]),
    )


def _pairs(where: str, split: Split, images: Sequence[str], masks: Sequence[str]) -> list[tuple[str, str]]:
    """Images with the mask of their name, whatever either ends in."""
    if not images or not masks:
        lacking = f"{where}{split}" if not images else f"{where}masks/{split}"
        raise UserError(f"{lacking} holds no images: lay the data out as {LAYOUT}")
    by_name = {str(PurePosixPath(mask).with_suffix("")): mask for mask in masks}
    pairs = [(image, by_name.get(str(PurePosixPath(image).with_suffix("")), "")) for image in images]
    without = [image for image, mask in pairs if not mask]
    if without:
        raise UserError(
            f"{len(without)} of {len(images)} images of {where}{split} have no mask, {without[0]} first: "
            f"add {where}masks/{split}/{PurePosixPath(without[0]).with_suffix('.png')}, or take the image out"
        )
    return pairs
