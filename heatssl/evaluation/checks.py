"""What evaluations ask of their settings and input, checked before anything is computed."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from heatssl.data import ImageData
from heatssl.errors import UserError

CHUNK = 2**24  # numbers that are looked at at a time


def check_numbers(config: Any, *, over_zero: Iterable[str] = (), not_negative: Iterable[str] = ()) -> None:
    """Settings that are to be finite and over 0, and such as may be 0.

    Raises:
        UserError: naming the first that is not.
    """
    over_zero = tuple(over_zero)
    for name in (*over_zero, *not_negative):
        value = getattr(config, name)
        if not math.isfinite(value) or value < 0 or (name in over_zero and not value):
            least = "over 0" if name in over_zero else "0 or more"
            raise UserError(f"{name} must be {least} and finite, not {value:g}")


def check_features(train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor) -> None:
    """Features (N, C) floating and finite, labels (N,) integer, both splits of one width and on one device.

    Raises:
        UserError: on any of these, with the split named.
    """
    for split, x, y in (("train", train_x, train_y), ("test", test_x, test_y)):
        if x.ndim != 2 or y.ndim != 1 or len(x) != len(y):
            raise UserError(
                f"{split} features must be (N, C) and labels (N,), not {tuple(x.shape)} and "
                f"{tuple(y.shape)}: pool over positions first"
            )
        _check_values(split, "features", x, y)
    if train_x.shape[1] != test_x.shape[1]:
        raise UserError(
            f"train features have {train_x.shape[1]} channels and test features {test_x.shape[1]}: "
            "extract both with the same backbone"
        )
    _check_device(train_x, train_y, test_x, test_y)


def check_maps(train_maps: Tensor, train_y: Tensor, test_maps: Tensor, test_y: Tensor) -> None:
    """Maps (N, C, h, w) floating and finite, labels (N,) integer, both splits of one size and on one device.

    Raises:
        UserError: on any of these, with the split named.
    """
    for split, maps, y in (("train", train_maps, train_y), ("test", test_maps, test_y)):
        if maps.ndim != 4 or y.ndim != 1 or len(maps) != len(y) or 0 in maps.shape[1:]:
            raise UserError(
                f"{split} maps must be (N, C, h, w) and labels (N,), not {tuple(maps.shape)} and "
                f"{tuple(y.shape)}: give feature maps that are not pooled"
            )
        _check_values(split, "maps", maps, y)
    if train_maps.shape[1:] != test_maps.shape[1:]:
        raise UserError(
            f"train maps are {tuple(train_maps.shape[1:])} and test maps {tuple(test_maps.shape[1:])}: "
            "extract both with the same backbone at the same image size"
        )
    _check_device(train_maps, train_y, test_maps, test_y)


def _check_values(split: str, kind: str, x: Tensor, y: Tensor) -> None:
    if len(x) == 0:
        raise UserError(f"{split} is empty: give at least one image")
    if not x.is_floating_point() or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
        raise UserError(f"{split} {kind} must be floating and labels integer, not {x.dtype} and {y.dtype}")
    if not is_finite(x):
        raise UserError(f"{split} {kind} contain NaN or infinity: the weights are broken, use an earlier checkpoint")


def is_finite(x: Tensor) -> bool:
    """Whether no number of x (N, ...), N over 0, is NaN or infinity."""
    # One number per chunk: a mask of the whole bank would cost a quarter of the bank's memory.
    return all(bool(torch.isfinite(part).all()) for part in x.split(max(1, CHUNK // max(1, x[0].numel()))))


def _check_device(*tensors: Tensor) -> None:
    if len({tensor.device for tensor in tensors}) > 1:
        raise UserError("train and test features and labels lie on different devices: move them to one")


def check_classes(train: ImageData, val: ImageData, split: str) -> None:
    """At least two classes, with images in train and in val; labels are positions among train's names in both.

    A subset smaller than the number of classes cannot have them all, and is let through.

    Args:
        train: what is learned from.
        val: what is tested.
        split: what to call it.

    Raises:
        UserError: naming the classes.
    """
    sizes = {name: _images_of_each_class(data) for name, data in (("train", train), (split, val))}
    if int((sizes["train"] > 0).sum()) < 2:
        raise UserError(
            f"all {len(train)} images of train are of class {train.classes[train.labels[0]]!r}: "
            "add a folder of images for a second class"
        )
    for name, other in (("train", split), (split, "train")):
        lacking = [train.classes[i] for i in ((sizes[name] == 0) & (sizes[other] > 0)).nonzero().flatten().tolist()]
        # Subsets go round the classes: where one has its second image, every class that has any has its first.
        if lacking and int(sizes[name].max()) > 1:
            more = f" and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise UserError(
                f"{name} has no image of class {lacking[0]!r}{more}, which {other} has: "
                f"add some to {name}, or take the class out of {other}"
            )


def _images_of_each_class(data: ImageData) -> Tensor:
    return torch.bincount(torch.tensor(data.labels), minlength=len(data.classes))


def check_labels(train_y: Tensor, test_y: Tensor) -> None:
    """Labels of a probe: not negative, at least two of them in train, and none in test that train lacks.

    Raises:
        UserError: on any of these.
    """
    present = train_y.unique()
    if present[0] < 0 or test_y.min() < 0:
        raise UserError("labels must not be negative: number the classes from 0")
    if len(present) < 2:
        raise UserError(f"all training images have label {int(present[0])}: a probe needs at least two classes")
    unknown = test_y[~torch.isin(test_y, present)].unique()
    if len(unknown):
        raise UserError(f"test has labels that train lacks: {unknown.tolist()[:10]}: use the same classes in both")


def check_grid(grid: Sequence[float]) -> None:
    """L2 strengths or learning rates: positive and finite.

    Raises:
        UserError: naming one that is not.
    """
    wrong = [point for point in grid if not (math.isfinite(point) and point > 0)]
    if wrong:
        raise UserError(f"grid must hold positive numbers, not {wrong[0]:g}")
