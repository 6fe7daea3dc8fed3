"""The protocol every data set speaks, and the subset of one."""

import hashlib
from collections.abc import Sequence
from functools import cached_property
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Split = Literal["train", "val"]


class ImageData(Protocol):
    """Labelled images, decoded one by one.

    Attributes:
        classes: names of the classes; a label is a position in this list.
        labels: the label of every image.
    """

    @property
    def classes(self) -> list[str]:
        """Names of the classes."""

    @property
    def labels(self) -> list[int]:
        """The label of every image."""

    def __len__(self) -> int:
        """Number of images."""

    def name(self, i: int) -> str:
        """What to call image i in a message or a report: its path, where it has one."""

    def version(self, i: int) -> str:
        """What changes when image i does, without reading it: name, size and times of its file."""

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB; raises whatever the decoder raises when the file is unreadable."""


class Subset:
    """Some images of another data set, in the order of ``indices``."""

    def __init__(self, data: ImageData, indices: Sequence[int] | NDArray[np.int64]) -> None:
        self.data = data
        self.indices = np.asarray(indices, dtype=np.int64)

    @property
    def classes(self) -> list[str]:
        """Names of the classes of the whole data set, those the subset misses included."""
        return self.data.classes

    @cached_property
    def labels(self) -> list[int]:
        """The label of every image."""
        labels = self.data.labels
        return [labels[i] for i in self.indices]

    def __len__(self) -> int:
        return len(self.indices)

    def name(self, i: int) -> str:
        """The name of image i."""
        return self.data.name(int(self.indices[i]))

    def version(self, i: int) -> str:
        """That of image i."""
        return self.data.version(int(self.indices[i]))

    def load(self, i: int) -> Image.Image:
        """Decode image i to RGB."""
        return self.data.load(int(self.indices[i]))


def digest(data: ImageData) -> str:
    """Hash of the versions and labels of all images, in order: another one when any image is added, changed or moved.

    Of a folder it asks for the state of every file.
    """
    found = hashlib.sha256("\n".join(data.classes).encode("utf-8", "surrogateescape"))
    for i, label in enumerate(data.labels):
        found.update(f"\n{label} {data.version(i)}".encode("utf-8", "surrogateescape"))
    return found.hexdigest()


def in_rounds(labels: Sequence[int], order: NDArray[np.int64]) -> NDArray[np.int64]:
    """The same indices in rounds with one image of each class that still has some: every beginning is balanced.

    Within a round they keep their order.
    """
    classes = np.asarray(labels)[order]
    grouped = np.argsort(classes, kind="stable")
    counts = np.bincount(classes, minlength=1)
    rank = np.empty(len(order), dtype=np.int64)  # of every image among those of its class
    rank[grouped] = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    return order[np.argsort(rank, kind="stable")]


def balanced_subset(data: ImageData, size: int, seed: int = 0) -> Subset:
    """``size`` images, as evenly over the classes as they allow, the same ones every time.

    A smaller subset of the same data and seed is contained in a larger one.
    """
    labels = np.asarray(data.labels)
    order = np.random.default_rng(seed).permutation(len(labels))
    by_class = order[np.argsort(labels[order], kind="stable")]
    return Subset(data, np.sort(in_rounds(data.labels, by_class)[:size]))
