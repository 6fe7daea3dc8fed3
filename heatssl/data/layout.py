"""The ImageFolder layout, in a folder or in a tar file: its checks and its table of files."""

from collections.abc import Iterable, Iterator, Sequence
from difflib import get_close_matches
from functools import cached_property
from pathlib import PurePosixPath

import numpy as np

from heatssl.data.image_data import Split
from heatssl.errors import UserError

SPLITS: tuple[Split, ...] = ("train", "val")
UNREAD = "data.held_out=0.1 leaves val unread, and takes a part of train in its place"
LAYOUT = "train/<class>/*.jpg and val/<class>/*.jpg"
WITHOUT_CLASSES = "to pretrain without classes, data=images takes any folder"
EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})


def is_image(name: str) -> bool:
    """True for the name of a visible image file; ``._x.jpg`` and the like are left behind by macOS."""
    return not name.startswith(".") and PurePosixPath(name).suffix.lower() in EXTENSIONS


class PathTable:
    """Immutable list of paths in one byte array.

    A million Python strings would be copied into every forked worker, page by page, as soon as their
    reference counts are touched; an array is shared.
    """

    def __init__(self, paths: Iterable[str]) -> None:
        encoded = [path.encode("utf-8", "surrogateescape") for path in paths]
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(encoded), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, i: int) -> str:
        i = range(len(self))[i]
        start = self._ends[i - 1] if i else 0
        return self._bytes[start : self._ends[i]].tobytes().decode("utf-8", "surrogateescape")

    def __iter__(self) -> Iterator[str]:
        return (self[i] for i in range(len(self)))


class ClassFolders:
    """What a split has in common wherever it is stored: classes, and paths with their labels.

    Args:
        classes: names of train's classes, sorted; a label is a position among them.
        paths: of the images, below the split.
        class_names: the class of each.
    """

    def __init__(self, classes: list[str], paths: Iterable[str], class_names: Iterable[str]) -> None:
        self.classes = classes
        label_of = {name: label for label, name in enumerate(classes)}
        self._paths = PathTable(paths)
        self._labels = np.array([label_of[name] for name in class_names])

    @cached_property
    def labels(self) -> list[int]:
        """The label of every image."""
        return [int(label) for label in self._labels]

    def __len__(self) -> int:
        return len(self._paths)


def check_split(where: str, split: Split, classes: Sequence[str], loose_images: int, expected: int | None) -> None:
    """Refuse a split that is not sorted into class folders.

    Args:
        where: the split as the user knows it, such as ``/data/imagenet/val``.
        split: which one it is.
        classes: its class folders.
        loose_images: images that lie outside any class folder.
        expected: the number of classes there must be, None: any.

    Raises:
        UserError: naming the fix.
    """
    if loose_images:
        beside = f"beside {len(classes)} class folders" if classes else "and no class folders"
        raise UserError(
            f"{where} holds {loose_images:,} loose images {beside}: move every image to {split}/<class>/, "
            f"with the class names of the other split; {WITHOUT_CLASSES}"
        )
    if not classes:
        raise UserError(f"{where} holds no images: fill it as {LAYOUT} ({', '.join(sorted(EXTENSIONS))})")
    if expected is not None and len(classes) != expected:
        raise UserError(
            f"{where} has {len(classes):,} class folders, not {expected:,}: "
            f"complete the data set, or set data.expected_classes={len(classes)}"
        )


def check_classes_agree(where: str, train: Sequence[str], val: Sequence[str]) -> None:
    """Refuse a val that holds a class unknown to train.

    Raises:
        UserError: naming the first such class and the nearest one of train, and what val lacks.
    """
    unknown, missing = sorted(set(val) - set(train)), sorted(set(train) - set(val))
    if unknown:
        nearest = get_close_matches(unknown[0], train, n=1)
        hint = f"rename it to {nearest[0]!r}" if nearest else "remove it"
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        lacking = f"class {unknown[0]!r}{more}, which train lacks"
        others = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        and_lacks = f", and lacks {missing[0]!r}{others}, which train has" if missing else ""
        raise UserError(f"{where} has {lacking}{and_lacks}: {hint}, or add it to train; {UNREAD}")


def root_of(root: str | None, name: str) -> str:
    """The configured root.

    Raises:
        UserError: when there is none.
    """
    if not root:
        raise UserError(f"data={name} needs a place to read from: add data.root=PATH")
    return root
