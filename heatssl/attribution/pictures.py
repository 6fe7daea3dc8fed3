"""The images that ``heatssl attribute`` explains: of val, or files and folders of the user's."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from heatssl.config import AttributeConfig, DataConfig
from heatssl.data import (
    BadFiles,
    Batch,
    ImageData,
    Split,
    balanced_subset,
    denormalise,
    eval_loader,
    has_masks,
    normalise,
    open_masked,
    open_split,
)
from heatssl.data.crop import centre_crop
from heatssl.data.decode import decode
from heatssl.data.folder import images_below
from heatssl.errors import UserError
from heatssl.evaluation.source import Source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Pictures:
    """Images to explain."""

    images: Tensor  # normalised (B, 3, S, S), on the device of the backbone
    names: list[str]
    labels: list[str]  # class names, "" when unknown
    photos: Sequence[str] = ()  # files that show them, relative to the run folder, once written; none: not to be shown


def pictures_of_split(config: AttributeConfig, source: Source) -> Pictures:
    """``config.count`` images of the split, see :func:`balanced_pictures`."""
    return balanced_pictures(config, source, config.count)


def balanced_pictures(config: AttributeConfig, source: Source, count: int) -> Pictures:
    """Images of the split, spread over its classes; a warning names each that cannot be read.

    Raises:
        UserError: when none of them can be read, or of a hundred and more too many cannot.
    """
    data = open_images(source.data, split_of(config))
    chosen = balanced_subset(data, count, config.seed)
    # So few images are read faster without starting workers.
    loader = eval_loader(chosen, replace(source.data, workers=0), batch_size=count)
    (batch,) = loader
    if not len(batch.images):
        raise UserError(
            f"none of the chosen images can be read, the first is {batch.bad[0]}: choose others with images=[...]"
        )
    BadFiles(source.data.bad_fraction).update(batch)
    names = [chosen.name(index) for index in batch.indices.tolist()]
    return Pictures(normalise(batch.images.to(source.device), source.data), names, class_names(data, batch))


def split_of(config: AttributeConfig) -> Split:
    """The setting ``split``.

    Raises:
        UserError: when it is none.
    """
    if config.split not in ("train", "val"):
        raise UserError(f"split={config.split} is none: use val, or train to choose settings")
    return "train" if config.split == "train" else "val"


def open_images(config: DataConfig, split: Split) -> ImageData:
    """A split, with masks where it has any: :class:`heatssl.data.MaskedData` then, whose files have no classes."""
    return open_masked(config, split) if has_masks(config, split) else open_split(config, split)


def class_names(data: ImageData, batch: Batch) -> list[str]:
    """Of each image of a batch; "" where the data has but one class, which tells nothing."""
    return [data.classes[label] if len(data.classes) > 1 else "" for label in batch.labels.tolist()]


def given_pictures(paths: Sequence[str], source: Source) -> Pictures:
    """Files, and all images below folders, cropped and scaled like those of val; a warning names each unreadable one.

    Raises:
        UserError: on a path that is not there, a folder without images, or when nothing can be read.
    """
    found, names, problems = [], [], []
    for file in _files(paths):
        try:
            found.append(read_picture(file, source))
            names.append(file)
        except UserError as error:
            problems.append(error)
            log.warning("skipped %s", error)
    if not found:
        raise problems[0]
    return Pictures(torch.stack(found), names, [""] * len(names))


def read_picture(path: str, source: Source) -> Tensor:
    """One image file -> normalised (3, S, S).

    Raises:
        UserError: when it cannot be read.
    """
    try:
        image = decode(Path(path).expanduser().read_bytes())
    except MemoryError:
        raise
    except Exception as error:  # decoders of damaged files raise nearly anything
        raise UserError(f"image {path} cannot be read ({error}): give the path of a JPEG or PNG file") from error
    pixels = centre_crop(image, source.data.image_size)
    return normalise(pixels[None].to(source.device), source.data)[0]


def pixels(images: Tensor, data: DataConfig) -> NDArray[np.uint8]:
    """Normalised (B, 3, S, S) -> as they were, (B, S, S, 3)."""
    shown: NDArray[np.uint8] = (
        (255 * denormalise(images, data)).round().byte().permute(0, 2, 3, 1).contiguous().cpu().numpy()
    )
    return shown


def _files(paths: Sequence[str]) -> list[str]:
    files: list[str] = []
    for path in paths:
        place = Path(path).expanduser()
        if not place.exists():
            raise UserError(f"image {path} does not exist: give files or folders of images")
        below = [str(Path(path) / name) for name in images_below(place)] if place.is_dir() else [path]
        if not below:
            raise UserError(f"folder {path} holds no images: give another, or the files themselves")
        files += below
    return list(dict.fromkeys(files))
