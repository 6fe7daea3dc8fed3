"""Learning rate of pretraining by step."""

from collections.abc import Callable

from heatssl.config import OptimizerConfig
from heatssl.schedule import warmup_cosine


def learning_rate(step: int, steps: int, optimizer: OptimizerConfig) -> float:
    """Learning rate of step ``step`` of ``steps``, both counted from 0.

    Rises by equal amounts to ``learning_rate``, which step ``warmup_steps`` is the first to have in full;
    falls along a cosine to ``final_learning_rate``, which the last step has. A run no longer than its warm-up ends
    before the peak.
    """
    peak, final, warmup = optimizer.learning_rate, optimizer.final_learning_rate, optimizer.warmup_steps
    share = warmup_cosine(step, warmup, steps - 1)
    return peak * share if step < warmup else final + (peak - final) * share


def factor(steps: int, optimizer: OptimizerConfig) -> Callable[[int], float]:
    """:func:`learning_rate` as a multiple of the peak, as torch's LambdaLR wants it."""
    return lambda step: learning_rate(step, steps, optimizer) / optimizer.learning_rate
