"""Images without classes, at known places of a folder or of a tar."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from PIL import Image

from heatssl.data import folder, tar
from heatssl.data.decode import decode
from heatssl.data.image_data import Split


class Contents(Protocol):
    """Bytes of files, by number."""

    def read(self, i: int) -> bytes:
        """Those of file i."""

    def version(self, i: int) -> str:
        """What changes when file i does, without reading it."""


class Files:
    """Image files; all have the label 0.

    Args:
        split: which one.
        names: of the images, to tell of them.
        contents: the files.

    Attributes:
        classes: one, for all images.
    """

    def __init__(self, split: Split, names: Sequence[str], contents: Contents) -> None:
        self.split = split
        self.classes = ["image"]
        self._names = names
        self._contents = contents

    @property
    def labels(self) -> list[int]:
        """Zeros: there is nothing to classify."""
        return [0] * len(self)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        """Path of image i, as far as it is one."""
        return self._names[i]

    def version(self, i: int) -> str:
        """What changes when image i does."""
        return self._contents.version(i)

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        return decode(self._contents.read(i))


@dataclass(frozen=True)
class InTar:
    """Entries of a tar."""

    reader: tar.Reader
    entries: list[tar.Entry]
    state: tuple[int, ...]  # of the tar when it was opened, see :func:`heatssl.data.tar.version_of`

    def read(self, i: int) -> bytes:
        return self.reader.read(self.entries[i].offset, self.entries[i].size)

    def version(self, i: int) -> str:
        return f"{self.entries[i]} {self.state}"


@dataclass(frozen=True)
class InFolder:
    """Files below a folder."""

    base: Path
    paths: list[str]

    def read(self, i: int) -> bytes:
        return (self.base / self.paths[i]).read_bytes()

    def version(self, i: int) -> str:
        return f"{self.paths[i]} {folder.state_of(self.base / self.paths[i])}"
