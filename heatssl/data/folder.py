"""``data=folder``: images in ``root/{train,val}/<class>/``, nested at will below the class."""

import os
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from heatssl.data.decode import decode
from heatssl.data.image_data import Split
from heatssl.data.layout import (
    LAYOUT,
    SPLITS,
    UNREAD,
    WITHOUT_CLASSES,
    ClassFolders,
    check_classes_agree,
    check_split,
    is_image,
    root_of,
)
from heatssl.errors import UserError


class ImageFiles(ClassFolders):
    """Image files below a folder.

    Args:
        folder: where paths begin.
        classes, paths, class_names: see :class:`heatssl.data.layout.ClassFolders`.
    """

    def __init__(self, folder: Path, classes: list[str], paths: Iterable[str], class_names: Iterable[str]) -> None:
        super().__init__(classes, paths, class_names)
        self.folder = folder

    def name(self, i: int) -> str:
        """Path of image i."""
        return str(self.folder / self._paths[i])

    def version(self, i: int) -> str:
        """Path below the folder, size and times of file i."""
        return f"{self._paths[i]} {state_of(self.folder / self._paths[i])}"

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        return decode((self.folder / self._paths[i]).read_bytes())


class Folder(ImageFiles):
    """One split of an image folder. Labels follow the sorted class names of train, in val as well.

    Args:
        root: the folder that holds ``train`` and ``val``.
        split: which one to read.
        expected_classes: the number of class folders both must have; None: any, and val may be missing
            when train is read.
        alone: train is read, and nothing is asked of val.

    Raises:
        UserError: when the layout is not that of an image folder; the message names the fix.
    """

    def __init__(
        self, root: str | None, split: Split, expected_classes: int | None = None, *, alone: bool = False
    ) -> None:
        base = existing(root_of(root, "folder"))
        names: dict[Split, list[str]] = {}
        for each in ("train",) if alone else SPLITS:
            if (base / each).is_dir() or expected_classes is not None or each in ("train", split):
                names[each] = _class_names(base, each, expected_classes)
        check_classes_agree(str(base / "val"), names["train"], names.get("val", []))

        folder = base / split
        found = {name: images_below(folder / name) for name in names[split]}
        empty = [name for name, paths in found.items() if not paths]
        if empty:
            raise UserError(f"{folder / empty[0]} holds no images: add some or remove the folder")
        super().__init__(
            folder,
            names["train"],
            (f"{name}/{path}" for name, paths in found.items() for path in paths),
            (name for name, paths in found.items() for _ in paths),
        )


def state_of(path: Path) -> str:
    """Size of a file, and when its contents and its entry have changed; empty where there is none any more."""
    try:
        stat = path.stat()
    except FileNotFoundError:
        return ""
    return f"{stat.st_size} {stat.st_mtime_ns} {stat.st_ctime_ns}"  # tools set the first of the times, not the second


def existing(root: str) -> Path:
    base = Path(root).expanduser()
    if base.is_file():
        raise UserError(f"data.root={root} is a file: for a tar file use data=tar")
    if not base.is_dir():
        raise UserError(f"data.root={root} does not exist: set it to the folder that holds train/ and val/")
    if not (base / "train").is_dir():
        if base.name in SPLITS:
            raise UserError(f"data.root={root} points into a split: use its parent, data.root={base.parent}")
        if not any(base.iterdir()):
            raise UserError(f"{base} is empty: fill it as {LAYOUT}")
        if any(images_below(child) for child in _visible_folders(base) if child.name != "val"):
            raise UserError(
                f"{base} has class folders but no train/: move them into {base / 'train'}, "
                f"and some of their images into {base / 'val'}; {WITHOUT_CLASSES}"
            )
    return base


def _class_names(base: Path, split: Split, expected: int | None) -> list[str]:
    folder = base / split
    if not folder.is_dir():
        instead = WITHOUT_CLASSES if split == "train" else UNREAD
        raise UserError(f"{folder} is missing: lay out {base} as {LAYOUT}; {instead}")
    names = [child.name for child in _visible_folders(folder)]
    loose = sum(is_image(entry.name) and entry.is_file() for entry in os.scandir(folder))
    check_split(str(folder), split, names, loose, expected)
    return names


def _visible_folders(folder: Path) -> list[Path]:
    """Those inside a folder, sorted; a link to a folder that holds this one is none of them."""
    children = sorted(Path(entry.path) for entry in os.scandir(folder) if entry.is_dir())
    here = folder.resolve()
    return [child for child in children if child.name[0] != "." and not here.is_relative_to(child.resolve())]


def images_below(folder: Path) -> list[str]:
    """Paths of all images below a folder, relative to it, sorted.

    Links to folders are followed, but for those to a folder that was met already or that holds this one.
    """
    found = []
    met = set(folder.resolve().parents)
    for parent, children, files in os.walk(folder, onerror=_refuse, followlinks=True):
        place = Path(parent).resolve()
        if place in met:
            children.clear()
            continue
        met.add(place)
        children[:] = sorted(child for child in children if not child.startswith("."))
        below = Path(parent).relative_to(folder)
        found += [(below / file).as_posix() for file in files if is_image(file)]
    return sorted(found)


def _refuse(error: OSError) -> None:
    """A folder that cannot be listed would otherwise count as an empty one."""
    raise error
