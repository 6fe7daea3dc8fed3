"""From a configuration to a data set."""

from heatssl.config import DataConfig
from heatssl.data.folder import Folder
from heatssl.data.image_data import ImageData, Split, balanced_subset
from heatssl.data.shapes import Shapes
from heatssl.data.tar import Tar
from heatssl.errors import UserError


def open_split(config: DataConfig, split: Split) -> ImageData:
    """Open train or val of the configured data set and check its layout.

    ``train_size`` and ``val_size`` say how many scenes ``shapes`` paints; of the others they take a
    class-balanced subset, the same one every time.

    Raises:
        UserError: on an unknown name or a layout that cannot work; the message names the fix.
    """
    size = config.train_size if split == "train" else config.val_size
    if size is not None and size < 1:
        raise UserError(f"data.{split}_size={size} leaves no image: use at least 1, or null for all")
    data: ImageData
    if config.name == "shapes":
        data = Shapes(split, config.image_size, size)
        if config.expected_classes not in (None, len(data.classes)):
            raise UserError(f"shapes has {len(data.classes)} classes: set data.expected_classes=null")
        return data
    if config.name == "folder":
        data = Folder(config.root, split, config.expected_classes)
    elif config.name == "tar":
        data = Tar(config.root, split, config.expected_classes)
    else:
        raise UserError(f"unknown data set {config.name!r}: use data=shapes, data=folder or data=tar")
    return data if size is None or size >= len(data) else balanced_subset(data, size)
