"""Two processes give the very numbers of one: otherwise a cluster's results and a desk's would not compare."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from heatssl.cli import main

TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "heatssl.cli"]


@pytest.mark.slow
def test_two_processes(
    write_run: Callable[..., Path],
    features_folder: Path,
    tmp_path: Path,
    python: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["evaluate", str(write_run(tmp_path / "run")), "workers=0", "batch_size=16"]
    assert main([*command, f"output={tmp_path / 'one'}"]) == 0
    spoken = capsys.readouterr().out
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    words = [python, *TORCHRUN, *command, f"output={tmp_path / 'two'}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.replace("/two/", "/one/").splitlines() == spoken.splitlines(), "only the first process speaks"

    one, two = (json.loads((tmp_path / name / "results.json").read_text())["results"] for name in ("one", "two"))
    for entry in [*one, *two]:
        del entry["seconds"]
    assert one == two
    kept = sorted((tmp_path / "home" / "heatssl" / "features").iterdir())
    assert [path.name for path in kept] == sorted(path.name for path in features_folder.iterdir())
    for path in kept:
        features = [torch.load(folder / path.name)["features"] for folder in (path.parent, features_folder)]
        assert torch.equal(*features)


@pytest.mark.slow
def test_two_processes_have_the_same_random_weights(tmp_path: Path, python: str) -> None:
    """Each draws its own network: of two different ones, half of the features would be the other's."""
    command = ["knn", "run=timm:test_vit?random", "data=shapes", "data.train_size=64", "data.val_size=40", "seed=4"]
    command += ["workers=0", "batch_size=16"]
    assert main([*command, f"output={tmp_path / 'one'}"]) == 0
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path / "home")}
    words = [python, *TORCHRUN, *command, f"output={tmp_path / 'two'}"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    (one,), (two,) = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["results"] for name in ("one", "two")
    )
    assert (one["key"], one["accuracy"]) == (two["key"], two["accuracy"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "kept"),
    [
        (["finetune", "mixup=0", "cutmix=0", "drop_path=0", "epochs=2"], "finetuned.safetensors"),
        (["probe", "protocol=mae", "epochs=2", "grid=[0.1,1.0]"], "augmented_probe.safetensors"),
    ],
)
def test_two_processes_train_as_one(
    command: list[str], kept: str, run: Path, tmp_path: Path, python: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Each with its share of every batch. Mixtures are each process's own, so there are none here."""
    command = [*command, f"run={run}", "workers=0", "batch_size=16", "random_init=false", "data=shapes"]
    command += ["data.train_size=64", "data.val_size=40"]
    assert main([*command, f"output={tmp_path / 'one'}"]) == 0
    spoken = capsys.readouterr().out
    words = [python, *TORCHRUN, *command, f"output={tmp_path / 'two'}"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == len(spoken.splitlines()), "only the first process speaks"
    files = [tmp_path.glob(f"{name}/*{kept}") for name in ("one", "two")]  # beside a run they begin with its name
    one, two = (safetensors.torch.load_file(next(found)) for found in files)
    untrained = safetensors.torch.load_file(run / "backbone.safetensors")
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")
        assert not torch.equal(value, untrained.get(key.removeprefix("backbone."), torch.zeros_like(value))), key


@pytest.mark.parametrize("command", [["segment"], ["health"]])
def test_a_command_of_one_process_says_so(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else every process would train the same, and write the same files over each other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, f"run={run}", "workers=0"]) == 2
    assert "this runs in one process: start it without torchrun" in capsys.readouterr().err
