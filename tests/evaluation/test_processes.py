"""Two processes give the very numbers of one: otherwise a cluster's results and a desk's would not compare."""

import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
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


@pytest.mark.parametrize("command", [["finetune"], ["segment"], ["health"], ["probe", "protocol=mae"]])
def test_a_command_of_one_process_says_so(
    command: list[str], run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Else every process would train the same, and write the same files over each other."""
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*command, f"run={run}", "workers=0"]) == 2
    assert "this runs in one process: start it without torchrun" in capsys.readouterr().err
