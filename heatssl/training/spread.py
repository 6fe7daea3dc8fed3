"""An order of images in which every beginning is balanced over classes."""

from collections import defaultdict
from collections.abc import Sequence

import torch


def spread_over_classes(labels: Sequence[int], seed: int) -> list[int]:
    """All indices, shuffled, in rounds with one image of each class that still has some."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed)).tolist()
    seen: defaultdict[int, int] = defaultdict(int)
    rounds = []
    for index in order:
        rounds.append((seen[labels[index]], index))
        seen[labels[index]] += 1
    # The sort is stable, so within a round the shuffled order stays.
    return [index for _, index in sorted(rounds, key=lambda entry: entry[0])]
