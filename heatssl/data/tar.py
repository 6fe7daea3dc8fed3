"""``data=tar``: one plain tar file in ImageFolder layout, read in place, as if it were unpacked."""

import os
import tarfile
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from heatssl.data.decode import decode
from heatssl.data.image_data import Split
from heatssl.data.layout import LAYOUT, SPLITS, ClassFolders, check_classes_agree, check_split, is_image, root_of
from heatssl.errors import UserError

_COMPRESSIONS = {  # first bytes of the file -> name, command that unpacks it once
    b"\x1f\x8b": ("gzip", "gunzip -k"),
    b"BZh": ("bzip2", "bunzip2 -k"),
    b"\xfd7zXZ": ("xz", "unxz -k"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd -k"),
}


class Tar(ClassFolders):
    """One split of a plain tar file, read at known offsets. Labels follow the sorted class names of train.

    Reads name their own offset (``os.pread``) on a descriptor that every process opens for itself, so any number of
    workers can share the object.

    Args:
        root: the tar file; its ``train`` and ``val`` may stand below other folders.
        split: which one to read.
        expected_classes: the number of classes both must have; None: any, and val may be missing when
            train is read.
        alone: train is read, and nothing is asked of val.

    Raises:
        UserError: when the file is not such a tar; the message names the fix.
    """

    def __init__(
        self, root: str | None, split: Split, expected_classes: int | None = None, *, alone: bool = False
    ) -> None:
        self.path = existing(root_of(root, "tar"))
        self._version = version_of(self.path)
        index = index_of(self.path, self._version)
        names: dict[Split, list[str]] = {}
        for each in ("train",) if alone else SPLITS:
            entries = index[each]
            if entries or expected_classes is not None or each in ("train", split):
                names[each] = sorted({_class_of(entry.path) for entry in entries} - {""})
                loose = sum(not _class_of(entry.path) for entry in entries)
                check_split(f"{self.path}:{each}", each, names[each], loose, expected_classes)
        check_classes_agree(f"{self.path}:val", names["train"], names.get("val", []))

        self.split = split
        entries = index[split]
        paths = [entry.path for entry in entries]
        super().__init__(names["train"], paths, map(_class_of, paths))
        self._offsets = np.array([entry.offset for entry in entries])
        self._sizes = np.array([entry.size for entry in entries])
        self._reader = Reader(self.path)

    def name(self, i: int) -> str:
        """For example ``imagenette96.tar:val/n01440764/0007.jpg``."""
        return f"{self.path.name}:{self.split}/{self._paths[i]}"

    def version(self, i: int) -> str:
        """Path and place in the tar, and what the tar was when it was opened."""
        return f"{self._paths[i]} {self._offsets[i]} {self._version}"

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        return decode(self._reader.read(int(self._offsets[i]), int(self._sizes[i])))


class Reader:
    """Bytes at known places of a file, for any number of processes, forked or spawned."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle: tuple[int, int] | None = None  # process, descriptor

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from there on."""
        process = os.getpid()
        if self._handle is None or self._handle[0] != process:
            self._handle = process, os.open(self.path, os.O_RDONLY)
        return os.pread(self._handle[1], size, offset)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_handle": None}

    def __del__(self) -> None:
        handle = getattr(self, "_handle", None)
        if handle is not None and handle[0] == os.getpid():
            os.close(handle[1])


class Entry(NamedTuple):
    """A file in a tar."""

    path: str  # of an image: below its split
    offset: int  # of the file's first byte in the tar
    size: int


def existing(root: str) -> Path:
    path = Path(root).expanduser()
    if path.is_dir():
        raise UserError(f"data.root={root} is a folder: use data=folder, or name a tar file")
    if not path.is_file():
        raise UserError(f"data.root={root} does not exist: set data.root to a tar file that holds {LAYOUT}")
    with path.open("rb") as file:
        start = file.read(8)
    for magic, (compression, command) in _COMPRESSIONS.items():
        if start.startswith(magic):
            raise UserError(f"{path} is compressed ({compression}) and cannot be read in place: `{command} {path}`")
    return path


def version_of(path: Path) -> tuple[int, ...]:
    """Size, and times of the last change: a file that has others is another one."""
    stat = path.stat()
    return stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns


def index_of(path: Path, version: tuple[int, ...], below: str = "") -> dict[Split, list[Entry]]:
    """The images of each split, sorted by path.

    The outermost ``train`` or ``val`` counts: ``masks/train/..`` beside ``train/..`` is something else, and found below
    ``masks``.

    Raises:
        UserError: when the file is no complete tar, holds no images, or some that cannot be read in place.
    """
    found = _index(path, version)
    if not found:
        raise UserError(f"{path} holds no images below train/ or val/: pack it as {LAYOUT}")
    outermost = min(found, key=lambda prefix: len(prefix.parts))
    splits = found.get(outermost / below, {})
    return {split: sorted(splits.get(split, [])) for split in SPLITS}


def locate(path: Path, name: str) -> Entry | None:
    """The outermost file of this name, such as ``annotations/train.json``, below any folders; None when there is none.

    Raises:
        UserError: when the file is no complete tar, or what has the name cannot be read in place.
    """
    wanted = PurePosixPath(name).parts
    files = _files(path)
    found = [each for each in files if PurePosixPath(each).parts[-len(wanted) :] == wanted]
    if not found:
        return None
    outermost = min(found, key=lambda each: len(PurePosixPath(each).parts))
    entry = files[outermost]
    if entry is None:
        raise _not_in_place(path, [outermost])
    return entry._replace(path=name)


@lru_cache(maxsize=4)
def _index(path: Path, _version: tuple[int, ...]) -> dict[PurePosixPath, dict[str, list[Entry]]]:
    """Images by what stands before their split; a file of another version (size, times) is read anew."""
    found: dict[PurePosixPath, dict[str, list[Entry]]] = {}
    elsewhere = []
    for name, entry in _files(path).items():
        place = _place(name)
        if place is None:
            continue
        prefix, split, below = place
        if entry is None:
            elsewhere.append(name)  # whatever its name: a link may stand for a folder of images
        elif is_image(below):
            splits = found.setdefault(prefix, {each: [] for each in SPLITS})
            splits[split].append(entry._replace(path=below))
    if elsewhere:
        raise _not_in_place(path, elsewhere)
    return found


def _not_in_place(path: Path, names: list[str]) -> UserError:
    return UserError(
        f"{path} holds {len(names):,} links or sparse files that cannot be read in place, {names[0]} first: "
        "pack it again with `tar -h` and without `-S`"
    )


def _files(path: Path) -> dict[str, Entry | None]:
    """Files by their path in a tar; None where one is a symbolic link, sparse, or a hard link to no file before it.

    As if it were unpacked: of several files of one path the last one counts, and a hard link is the file it names.
    """
    found: dict[str, Entry | None] = {}
    try:
        with tarfile.open(path, "r:") as archive:
            while (member := archive.next()) is not None:
                archive.members = []  # type: ignore[attr-defined]  # else all headers stay in memory
                name = str(PurePosixPath(member.name))
                if member.isreg() and not member.issparse():
                    found[name] = Entry(name, member.offset_data, member.size)
                elif member.isreg() or member.issym():
                    found[name] = None
                elif member.islnk():
                    found[name] = found.get(str(PurePosixPath(member.linkname)))
            # tarfile ends at a damaged header, and where the file ends, as it does at the zeros behind the last file.
            assert archive.fileobj is not None
            archive.fileobj.seek(archive.offset)
            if archive.fileobj.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                raise tarfile.ReadError(f"damaged or cut off at byte {archive.offset:,}")
    except tarfile.ReadError as error:
        raise UserError(f"{path} is not a complete tar file ({error}): copy or pack it again") from error
    return found


def _place(name: str) -> tuple[PurePosixPath, str, str] | None:
    """What stands before the split, the split, and the path below it; None for what is hidden or in no split."""
    parts = PurePosixPath(name).parts
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in parts)
    depth = next((depth for depth, part in enumerate(parts[:-1]) if part in SPLITS), None)
    if hidden or depth is None:
        return None
    return PurePosixPath(*parts[:depth]), parts[depth], "/".join(parts[depth + 1 :])


def _class_of(path: str) -> str:
    name, slash, _ = path.partition("/")
    return name if slash else ""
