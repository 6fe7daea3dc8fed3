"""The learning rate is what the recipe says it is."""

import math

import pytest

from heatssl.config import OptimizerConfig
from heatssl.training.schedule import factor, learning_rate

OPTIMIZER = OptimizerConfig(learning_rate=1.0, final_learning_rate=0.1, warmup_steps=4)


def test_warm_up_rises_evenly_to_the_peak() -> None:
    assert [learning_rate(step, 21, OPTIMIZER) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_passes_its_middle_and_ends_at_the_final_rate() -> None:
    assert learning_rate(12, 21, OPTIMIZER) == pytest.approx(0.55)
    assert learning_rate(8, 21, OPTIMIZER) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert learning_rate(20, 21, OPTIMIZER) == pytest.approx(0.1)
    assert learning_rate(21, 21, OPTIMIZER) == pytest.approx(0.1)


def test_never_zero_however_short_the_run() -> None:
    """A rehearsal of a few steps must train, though its warm-up never ends."""
    assert all(learning_rate(step, 3, OPTIMIZER) > 0 for step in range(3))
    assert learning_rate(0, 1, OptimizerConfig(warmup_steps=0)) == OptimizerConfig().learning_rate


def test_factor_is_relative_to_the_peak() -> None:
    doubled = OptimizerConfig(learning_rate=2.0, final_learning_rate=0.2, warmup_steps=4)
    assert factor(21, doubled)(4) == 1.0
    assert factor(21, doubled)(20) == pytest.approx(0.1)
