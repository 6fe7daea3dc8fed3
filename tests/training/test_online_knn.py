"""The online kNN measures what it says it does, and leaves val alone."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heatssl.config import PretrainConfig
from heatssl.data import ImageData, open_split
from heatssl.export import load_backbone
from heatssl.training import pretrain, run
from heatssl.training.metrics import read
from heatssl.training.online_knn import OnlineKnn, split
from heatssl.training.spread import spread_over_classes

MakeConfig = Callable[..., PretrainConfig]


def test_bank_and_queries_are_disjoint_and_balanced(make_config: MakeConfig) -> None:
    data = open_split(make_config().data, "train")
    bank, queries = split(data, bank_size=40, query_size=10, seed=0)
    assert not set(bank.indices) & set(queries.indices)
    assert set(Counter(bank.labels).values()) == {4}
    assert set(Counter(queries.labels).values()) == {1}
    larger, same_queries = split(data, bank_size=60, query_size=10, seed=0)
    assert list(same_queries.indices) == list(queries.indices)
    assert set(bank.indices) <= set(larger.indices)


def test_small_data_sets_are_shared_out(make_config: MakeConfig) -> None:
    bank, queries = split(open_split(make_config().data, "train"), bank_size=2000, query_size=500, seed=0)
    assert (len(bank), len(queries)) == (64, 16)


def test_spread_takes_one_of_each_class_first() -> None:
    labels = [0] * 50 + [1] * 3 + [2]
    order = spread_over_classes(labels, seed=0)
    assert sorted(order) == list(range(54))
    assert {labels[index] for index in order[:3]} == {0, 1, 2}
    assert [labels[index] for index in order[3:5]] in ([0, 1], [1, 0])


def test_val_is_only_opened_for_pictures(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The best weights are chosen by the online kNN: val must have no say in it."""
    config = make_config(steps=2, knn_every=1)
    loaded: list[int] = []
    opened = run.open_split

    class Watched:
        def __init__(self, data: ImageData) -> None:
            self.data, self.classes, self.labels = data, data.classes, data.labels

        def __len__(self) -> int:
            return len(self.data)

        def name(self, i: int) -> str:
            return self.data.name(i)

        def load(self, i: int) -> object:
            loaded.append(i)
            return self.data.load(i)

    monkeypatch.setattr(run, "open_split", lambda c, s: Watched(opened(c, s)) if s == "val" else opened(c, s))
    pretrain(config)
    assert len(loaded) == 8


def test_best_weights_are_those_of_the_best_step(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracies = iter([0.9, 0.3, 0.6, 0.5])  # at steps 0 (random weights, never the best), 2, 4, 6
    monkeypatch.setattr(OnlineKnn, "evaluate", lambda *_: next(accuracies))
    folder = pretrain(make_config(steps=6, knn_every=2))
    assert load_backbone(folder / "best")[1].step == 4
    assert load_backbone(folder)[1].step == 6
    assert torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["global_step"] == 4
    assert [line["knn/accuracy"] for line in read(folder / "metrics.jsonl") if "knn/accuracy" in line] == [
        0.9,
        0.3,
        0.6,
        0.5,
    ]


def test_evaluation_changes_nothing(make_config: MakeConfig) -> None:
    """Watching more often must not give another run."""
    folders: list[Path] = [pretrain(make_config(f"every{every}", steps=4, knn_every=every)) for every in (1, 0)]
    often, never = (
        [line["train/loss"] for line in read(folder / "metrics.jsonl") if "train/loss" in line] for folder in folders
    )
    assert often == never
