"""Every learning rate of the package follows this curve: a kink or a dead step would show in all results."""

import math

import pytest

from heatssl.schedule import warmup_cosine


def test_rises_evenly_passes_the_middle_and_ends_at_nothing() -> None:
    assert [warmup_cosine(step, 4, 20) for step in range(5)] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert warmup_cosine(12, 4, 20) == pytest.approx(0.5)
    assert warmup_cosine(8, 4, 20) == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))
    assert [warmup_cosine(step, 4, 20) for step in (20, 21)] == [0.0, 0.0]


def test_a_warm_up_longer_than_the_training_only_rises() -> None:
    shares = [warmup_cosine(step, 10, 5) for step in range(5)]
    assert shares == sorted(shares)
    assert min(shares) > 0
