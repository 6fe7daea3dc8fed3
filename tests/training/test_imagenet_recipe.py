"""recipe=imagenet_vit_small on a folder laid out like ImageNet-1k: it starts, learns, and checks the layout first."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatssl.cli import main
from heatssl.training.metrics import read


@pytest.fixture(scope="module")
def imagenet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """1,000 class folders in train and in val, one image each."""
    root = tmp_path_factory.mktemp("imagenet")
    picture = root / "picture.jpg"
    noise = np.random.default_rng(0).integers(0, 255, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((240, 232), Image.Resampling.BICUBIC).save(picture)
    for split in ("train", "val"):
        for number in range(1000):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            shutil.copy(picture, folder / "0.JPEG")
    picture.unlink()
    return root


@pytest.fixture
def run(imagenet: Path, tmp_path: Path) -> Callable[..., int]:
    """The recipe as it ships, but for what a CPU and 20 steps ask for."""
    settings = ["recipe=imagenet_vit_small", f"data.root={imagenet}", f"output={tmp_path / 'run'}", "data.workers=2"]
    settings += ["trainer.steps=20", "trainer.batch_size=4", "trainer.devices=1", "trainer.precision=32"]
    settings += ["trainer.knn_every=0", "trainer.log_every=5", "trainer.accelerator=cpu", "optimizer.warmup_steps=4"]
    return lambda *overrides: main(["pretrain", *settings, *overrides])


def test_twenty_steps(run: Callable[..., int], tmp_path: Path) -> None:
    assert run() == 0
    losses = [line["train/loss"] for line in read(tmp_path / "run" / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0]


def test_the_layout_is_checked_before_the_first_step(
    run: Callable[..., int], imagenet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (imagenet / "val" / "n00000999").rename(imagenet / "away")
    try:
        assert run() == 2
    finally:
        (imagenet / "away").rename(imagenet / "val" / "n00000999")
    error = capsys.readouterr().err
    assert "1000" in error.replace(",", "")
    assert "999" in error
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
