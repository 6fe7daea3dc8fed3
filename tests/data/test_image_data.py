"""Small subsets decide settings and draw pictures: one that misses classes misleads."""

from collections import Counter

import numpy as np

from heatssl.config import DataConfig
from heatssl.data import balanced_subset, in_rounds, open_split


def test_every_beginning_is_balanced_and_a_class_keeps_its_order() -> None:
    labels = [0] * 50 + [1] * 3 + [2]
    order = np.random.default_rng(0).permutation(54)
    rounds = in_rounds(labels, order)
    assert sorted(rounds) == list(range(54))
    for size in range(1, 54):
        counts = Counter(labels[index] for index in rounds[:size])
        unfinished = [counts[label] for label in range(3) if counts[label] < labels.count(label)]
        assert max(counts.values()) - min(unfinished) <= 1
    for label in range(3):
        assert [i for i in rounds if labels[i] == label] == [i for i in order if labels[i] == label]


def test_a_smaller_subset_is_part_of_a_larger_one() -> None:
    data = open_split(DataConfig(train_size=47), "train")
    small, large = balanced_subset(data, 13), balanced_subset(data, 23)
    assert set(small.indices) <= set(large.indices)
    assert sorted(Counter(large.labels).values()) == [2] * 7 + [3] * 3
    # They decide what data.held_out holds out: others would make another protocol of recorded numbers.
    assert small.indices.tolist() == [2, 3, 4, 6, 10, 11, 18, 19, 20, 21, 27, 35, 42]
