"""How far a mean over images may be off because there were no more of them."""

import numpy as np
from numpy.typing import ArrayLike


def bootstrap_interval(
    values: ArrayLike, *, level: float = 0.95, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap of a mean (Efron and Tibshirani 1993, chapter 13): nan counts as not there.

    Args:
        values: (N,) scores of images.
        level: share of the resampled means that lie between the ends.
        draws: resamples of N images each.
        seed: of the draws.

    Returns:
        lower and upper end; nan when there is no value.
    """
    known = np.asarray(values, dtype=np.float64)
    known = known[~np.isnan(known)]
    if not known.size:
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    # One draw at a time: memory does not grow with the number of draws.
    means = [known[random.integers(known.size, size=known.size)].mean() for _ in range(draws)]
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
