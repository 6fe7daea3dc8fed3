"""Unreadable files are counted over all sittings of a run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from heatssl.config import DataConfig, PretrainConfig
from heatssl.config_file import load_config
from heatssl.errors import UserError
from heatssl.training import pretrain
from heatssl.training.module import PretrainModule

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture
def make(make_config: MakeConfig, tmp_path: Path) -> MakeConfig:
    """``make("name", steps=5)``: a run on 20 files, of which two are damaged."""
    for split, count in (("train", 20), ("val", 4)):
        for i in range(count):
            path = tmp_path / "images" / split / "ab"[i % 2] / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (10 * i, 20, 30)).save(path)
            if split == "train" and i < 2:
                path.write_bytes(b"damaged")

    def make(name: str, bad_fraction: float, **settings: object) -> PretrainConfig:
        root = str(tmp_path / "images")
        data = DataConfig(name="folder", root=root, image_size=32, bad_fraction=bad_fraction, workers=0)
        return dataclasses.replace(make_config(name, knn_every=0, **settings), data=data)

    return make


def run_until(step: int, config: PretrainConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the run die in the middle of a step."""
    training_step = PretrainModule.training_step

    def dying(module: PretrainModule, *arguments: object) -> torch.Tensor:
        if module.global_step == step:
            raise ZeroDivisionError
        return training_step(module, *arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(PretrainModule, "training_step", dying)
        with pytest.raises(ZeroDivisionError):
            pretrain(config)


def counts(config: PretrainConfig) -> object:
    return torch.load(Path(config.output) / "checkpoints/last.ckpt", weights_only=True)["bad_files"]


def test_a_resumed_run_counts_on_and_names_each_file_once(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config, whole = make("resumed", 0.5, steps=12, checkpoint_every=8), make("whole", 0.5, steps=12)
    run_until(9, config, monkeypatch)
    pretrain(config)
    assert sorted(record.message.split(":")[0][-5:] for record in caplog.records) == ["0.png", "1.png"]
    pretrain(whole)
    assert counts(config) == counts(whole)


def test_the_share_that_stops_a_run_is_that_of_all_sittings(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("resumed", 0.05, steps=20, checkpoint_every=8)
    run_until(9, config, monkeypatch)
    with pytest.raises(UserError, match="of 104 images could not be read"):  # the first step after 100 images
        pretrain(config)


def test_a_run_that_failed_its_last_check_is_not_finished_by_calling_it_again(make: MakeConfig) -> None:
    config = make("short", 0.05, steps=4)
    for _ in range(2):
        with pytest.raises(UserError, match=r"of 32 images could not be read.*raise data\.bad_fraction"):
            pretrain(config)
    folder = pretrain(make("short", 0.5, steps=4))  # the remedy that the message names
    assert (folder / "pictures.npz").exists()
    assert load_config(folder / "config.yaml").data.bad_fraction == 0.5
