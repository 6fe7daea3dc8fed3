"""``data=images``: any folder of images, nested at will, without classes: to pretrain on, not to measure with."""

from pathlib import Path

import numpy as np

from heatssl.data.folder import ImageFiles, images_below
from heatssl.data.image_data import Split
from heatssl.data.layout import root_of
from heatssl.errors import UserError

LEAST, MOST = 8, 1000  # images of val, of a small folder and of a large one


class Images(ImageFiles):
    """One split of a folder without classes: a hundredth of the images, evenly over their sorted paths, is val.

    Args:
        root: the folder.
        split: which part to read.

    Raises:
        UserError: when there is no such folder, or fewer than two images below it.
    """

    def __init__(self, root: str | None, split: Split) -> None:
        base = Path(root_of(root, "images")).expanduser()
        if not base.is_dir():
            raise UserError(f"data.root={root} is no folder: set it to the one that holds the images")
        paths = images_below(base)
        if len(paths) < 2:
            raise UserError(f"{base} holds {len(paths)} images: give two or more, one to train on and one to look at")
        of_val = set(val_positions(len(paths)))
        chosen = [path for i, path in enumerate(paths) if (i in of_val) == (split == "val")]
        super().__init__(base, ["images"], chosen, ["images"] * len(chosen))


def val_positions(images: int) -> list[int]:
    """Which of so many images, in the order of their paths, are val: a hundredth, 8 to 1,000, and at most half."""
    count = min(max(images // 100, LEAST), images // 2, MOST)
    return [int(i) for i in np.linspace(0, images - 1, count).round()]
