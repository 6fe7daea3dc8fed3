"""A stale or damaged feature would shift every number after it, silently."""

import dataclasses
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heatssl.cli import main
from heatssl.config import DataConfig, KnnConfig, ProbeConfig
from heatssl.evaluation import feature_cache, run_knn, run_probe, split_features
from heatssl.evaluation.results import read_results
from heatssl.evaluation.source import open_source

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)


@pytest.fixture
def extracted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """An entry for each split that is extracted."""
    calls: list[int] = []
    real = split_features.extract_features
    monkeypatch.setattr(split_features, "extract_features", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def forget() -> None:
    """As a new process would begin."""
    split_features._features.clear()


@pytest.fixture
def images(tmp_path: Path) -> DataConfig:
    for split in ("train", "val"):
        for label, name in enumerate("ab"):
            for i in range(6):
                file = tmp_path / "images" / split / name / f"{i}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                pixels = np.random.default_rng((label, i)).integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(file)
    return DataConfig(name="folder", root=str(tmp_path / "images"), image_size=32, workers=0)


def test_another_process_does_not_extract_again(run: Path, extracted: list[int]) -> None:
    run_probe(ProbeConfig(run=str(run), workers=0))
    assert len(extracted) == 4
    forget()
    run_knn(KnnConfig(run=str(run), workers=0))
    assert len(extracted) == 4


def test_numbers_are_the_same_with_and_without(run: Path, features_folder: Path, extracted: list[int]) -> None:
    opened = open_source(KnnConfig(run=str(run), workers=0), cache=True)
    first, labels = split_features.split_features(opened.backbone, "train", opened, 256)
    forget()
    kept, kept_labels = split_features.split_features(opened.backbone, "train", opened, 256)
    assert len(extracted) == 1
    assert kept.dtype == torch.float32
    assert torch.equal(first, kept)
    assert torch.equal(labels, kept_labels)
    forget()
    for path in features_folder.iterdir():
        path.unlink()
    without = dataclasses.replace(opened, cache=False)
    assert torch.equal(split_features.split_features(opened.backbone, "train", without, 256)[0], kept)
    assert list(features_folder.iterdir()) == []


@pytest.mark.parametrize("change", ["weights", "heads", "image", "image with its time", "new image", "size", "code"])
def test_a_change_of_anything_is_seen(
    change: str,
    images: DataConfig,
    run: Path,
    write_run: Callable[..., Path],
    extracted: list[int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = KnnConfig(run=str(run), workers=0, data=images, k=3, random_init=False)
    run_knn(config)
    assert len(extracted) == 2
    forget()
    file = Path(str(images.root)) / "val" / "b" / "3.png"
    expected = 3
    if change == "weights":
        write_run(run, seed=4)
        expected = 4
    elif change == "heads":  # of attention: they leave no trace in the weights
        description = run / "backbone.json"
        description.write_text(description.read_text().replace('"num_heads": 2', '"num_heads": 4'))
        expected = 4
    elif change == "new image":
        Image.new("RGB", (32, 32)).save(file.with_name("9.png"))
    elif change.startswith("image"):
        before = file.stat()
        pixels = np.asarray(Image.open(file)).copy()[::-1]
        Image.fromarray(pixels).save(file)
        if change == "image with its time":
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    elif change == "size":
        config = dataclasses.replace(config, data=dataclasses.replace(images, val_size=8))
    else:
        monkeypatch.setattr(feature_cache, "code", lambda: "other code")
        expected = 4
    run_knn(config)
    assert len(extracted) == expected


@pytest.mark.parametrize("damage", ["half", "flipped", "empty", "foreign"])
def test_a_damaged_file_is_told_of_and_made_again(
    damage: str, run: Path, features_folder: Path, extracted: list[int], caplog: pytest.LogCaptureFixture
) -> None:
    config = KnnConfig(run=str(run), workers=0, random_init=False)
    (first,) = run_knn(config)
    for path in features_folder.iterdir():
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[len(content) // 2] ^= 1
        path.write_bytes(
            {"half": content[: len(content) // 2], "empty": b"", "foreign": b"x" * 999}.get(damage, content)
        )
    forget()
    (second,) = run_knn(config)
    assert second.accuracy == first.accuracy
    assert len(extracted) == 4
    told = [record.getMessage() for record in caplog.records]
    assert len(told) == 2
    assert all("is damaged" in line and "\n" not in line for line in told)
    forget()
    run_knn(config)
    assert len(extracted) == 4, "the new file is whole"


def test_an_interrupted_extraction_leaves_nothing(
    run: Path, features_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_knn(KnnConfig(run=str(run), workers=0))
    assert list(features_folder.iterdir()) == []


def test_the_least_recently_used_go_first(
    run: Path, write_run: Callable[..., Path], features_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_knn(KnnConfig(run=str(run), workers=0, random_init=False))
    old = sorted(features_folder.iterdir())
    for path in old:
        os.utime(path, (1, 1))
    monkeypatch.setattr(feature_cache, "MOST_BYTES", 3 * max(path.stat().st_size for path in old))
    write_run(run, seed=4)
    run_knn(KnnConfig(run=str(run), workers=0, random_init=False))
    kept = sorted(features_folder.iterdir())
    assert len(kept) == 3
    assert len(set(kept) & set(old)) == 1


def test_a_folder_that_cannot_be_written_stops_nothing(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError("mine alone")

    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(feature_cache, "folder", lambda: tmp_path / "file" / "features")
    assert main(["knn", f"run={run}", "workers=0", "random_init=false"]) == 0
    assert "features are not kept" in caplog.text
    caplog.clear()
    forget()
    with monkeypatch.context() as patch:
        patch.setattr(split_features.feature_cache.torch, "load", forbidden)
        assert main(["knn", f"run={run}", "workers=0", "random_init=false"]) == 0
    assert "cannot be read (mine alone)" in caplog.text
    caplog.clear()
    forget()
    assert main(["knn", f"run={run}", "workers=0", "random_init=false", "cache=false"]) == 0
    assert caplog.text == ""
    assert len(read_results(run / "evaluation.json")) == 1


@pytest.mark.slow
def test_two_commands_at_once(run: Path, tmp_path: Path, python: str) -> None:
    """Both make the same files; neither may read half of one."""
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    command = [python, "-m", "heatssl.cli", "knn", f"run={run}", "workers=0", "random_init=false"]
    running = [
        subprocess.Popen([*command, f"output={tmp_path / str(i)}"], env=environment, stderr=subprocess.PIPE, text=True)
        for i in range(2)
    ]
    told = [process.communicate()[1] for process in running]
    assert [process.returncode for process in running] == [0, 0]
    assert "damaged" not in "".join(told)
    numbers = {read_results(tmp_path / str(i) / "evaluation.json")[0]["accuracy"] for i in range(2)}
    assert len(numbers) == 1
    assert sorted(path.suffix for path in (tmp_path / "home" / "heatssl" / "features").iterdir()) == [".pt", ".pt"]
