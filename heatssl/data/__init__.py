"""Where images come from and how they become batches."""

from heatssl.data.augment import augment, denormalise, normalise
from heatssl.data.batch import BadFiles, Batch
from heatssl.data.boxed import Boxed, Squares, open_boxed
from heatssl.data.boxes import Boxes
from heatssl.data.image_data import ImageData, Split, Subset, balanced_subset, digest, in_rounds
from heatssl.data.loading import eval_loader, steps_per_epoch, train_loader
from heatssl.data.masked import MaskedData, has_masks, open_masked
from heatssl.data.open import open_split

__all__ = [
    "BadFiles",
    "Batch",
    "Boxed",
    "Boxes",
    "ImageData",
    "MaskedData",
    "Split",
    "Squares",
    "Subset",
    "augment",
    "balanced_subset",
    "denormalise",
    "digest",
    "eval_loader",
    "has_masks",
    "in_rounds",
    "normalise",
    "open_boxed",
    "open_masked",
    "open_split",
    "steps_per_epoch",
    "train_loader",
]
