"""An order of images in which every beginning is balanced over classes."""

from collections.abc import Sequence

import torch

from heatssl.data import in_rounds


def spread_over_classes(labels: Sequence[int], seed: int) -> list[int]:
    """All indices, shuffled, in rounds with one image of each class that still has some."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    return [int(index) for index in in_rounds(labels, order.numpy())]
