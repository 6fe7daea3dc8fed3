"""The schedule that all of heatssl's training shares: linear warm-up, then half a cosine."""

import math


def warmup_cosine(step: int, warmup: int, end: int) -> float:
    """Share of the peak at ``step``, counted from 0.

    Rises by equal amounts to 1, which step ``warmup`` is the first to have in full; falls along half a cosine to 0,
    which step ``end`` has, and every step after it.
    """
    if step < warmup:
        return (step + 1) / (warmup + 1)
    progress = min(1.0, (step - warmup) / max(1, end - warmup))
    return 0.5 * (1 + math.cos(math.pi * progress))
