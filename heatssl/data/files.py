"""Images without classes, at known places of a folder or of a tar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from heatssl.data import tar
from heatssl.data.decode import decode
from heatssl.data.image_data import Split


class Files:
    """Image files; all have the label 0.

    Args:
        split: which one.
        names: of the images, to tell of them.
        read: the bytes of file i.

    Attributes:
        classes: one, for all images.
    """

    def __init__(self, split: Split, names: Sequence[str], read: Callable[[int], bytes]) -> None:
        self.split = split
        self.classes = ["image"]
        self._names = names
        self._read = read

    @property
    def labels(self) -> list[int]:
        """Zeros: there is nothing to classify."""
        return [0] * len(self)

    def __len__(self) -> int:
        return len(self._names)

    def name(self, i: int) -> str:
        """Path of image i, as far as it is one."""
        return self._names[i]

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        return decode(self._read(i))


@dataclass(frozen=True)
class InTar:
    """Reads entry i of a tar."""

    reader: tar.Reader
    entries: list[tar.Entry]

    def __call__(self, i: int) -> bytes:
        return self.reader.read(self.entries[i].offset, self.entries[i].size)


@dataclass(frozen=True)
class InFolder:
    """Reads file i below a folder."""

    base: Path
    paths: list[str]

    def __call__(self, i: int) -> bytes:
        return (self.base / self.paths[i]).read_bytes()
