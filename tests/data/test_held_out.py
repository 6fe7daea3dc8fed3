"""If these fail, settings are chosen on images that were trained on, or on val itself."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heatssl.config import DataConfig
from heatssl.data import open_split
from heatssl.errors import UserError


def test_train_and_the_held_out_share_are_disjoint_and_complete() -> None:
    whole = open_split(DataConfig(train_size=200), "train")
    config = DataConfig(train_size=200, held_out=0.1)
    train, held = open_split(config, "train"), open_split(config, "val")
    names = [data.name(i) for data in (train, held) for i in range(len(data))]
    assert sorted(names) == sorted(whole.name(i) for i in range(200))
    assert len(held) == 20
    assert sorted(held.labels) == sorted(list(range(10)) * 2)
    assert held.load(0).tobytes() == whole.load(int(held.name(0)[6:11])).tobytes()


def test_the_same_images_every_time() -> None:
    config = DataConfig(train_size=200, held_out=0.1)
    first, second = open_split(config, "val"), open_split(config, "val")
    assert [first.name(i) for i in range(20)] == [second.name(i) for i in range(20)]


def test_val_is_not_opened(tmp_path: Path, write_images: Callable[..., Path]) -> None:
    write_images(tmp_path, *(f"train/{name}/{i}.jpg" for name in "ab" for i in range(10)))
    config = DataConfig(name="folder", root=str(tmp_path), held_out=0.2)  # there is no val folder at all
    assert len(open_split(config, "train")) == 16
    assert open_split(config, "val").labels == [0, 0, 1, 1]


@pytest.mark.parametrize("share", [-0.1, 0.001, 1.0, 2.0])
def test_a_share_that_splits_nothing_is_refused(share: float) -> None:
    with pytest.raises(UserError, match=r"data\.held_out"):
        open_split(DataConfig(train_size=20, held_out=share), "val")
