"""Boxes around objects, in shares of the image: stretching it changes nothing."""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray


class Boxes(NamedTuple):
    """All objects of one image."""

    corners: NDArray[np.float32]  # (K, 4) left, top, right, bottom, shares of width and height in [0, 1]
    labels: NDArray[np.int64]  # (K,) positions among the classes
    crowd: NDArray[np.bool_]  # (K,) around more objects than one can count: neither learned nor a mistake to find

    def mirrored(self) -> "Boxes":
        """Those of the image with left and right exchanged."""
        left, top, right, bottom = self.corners.T
        return self._replace(corners=np.stack([1 - right, top, 1 - left, bottom], axis=1))


def as_boxes(corners: Any, labels: Any, crowd: Any = None) -> Boxes:
    """Lists as :class:`Boxes`; empty ones as well. ``crowd`` None: none is."""
    crowd = np.zeros(len(labels)) if crowd is None else crowd
    return Boxes(
        np.asarray(corners, dtype=np.float32).reshape(-1, 4),
        np.asarray(labels, dtype=np.int64),
        np.asarray(crowd, dtype=np.bool_),
    )


def box_of_mask(mask: NDArray[np.bool_], label: int = 0) -> Boxes:
    """The box around all pixels (H, W) that are True; none where there is no such pixel."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return as_boxes([], [])
    height, width = mask.shape
    corners = [columns[0] / width, rows[0] / height, (columns[-1] + 1) / width, (rows[-1] + 1) / height]
    return as_boxes([corners], [label])
