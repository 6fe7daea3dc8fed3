"""A run that was stopped, however rudely, ends like one that was not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from heatssl.config import PretrainConfig
from heatssl.config_file import save_config
from heatssl.export import load_backbone
from heatssl.training import pretrain
from heatssl.training.checkpoint import AtomicCheckpointIO
from heatssl.training.module import PretrainModule, step_seed
from heatssl.training.online_knn import OnlineKnn

MakeConfig = Callable[..., PretrainConfig]

REPEATABLE = (
    "step",
    "epoch",
    "train/loss",
    "train/gradient_norm",
    "train/lr",
    "knn/accuracy",
    "health/rankme",
)

KILLED_WHILE_WRITING = """
import io, os, signal, sys
import torch
from heatssl.config_file import load_config
from heatssl.export import load_backbone
from heatssl.training import pretrain
from heatssl.training.checkpoint import AtomicCheckpointIO

torch.set_num_threads(1)
saved = []
save = torch.save

def half(checkpoint, file):
    saved.append(checkpoint["global_step"])
    if saved == [8, 16]:
        whole = io.BytesIO()
        save(checkpoint, whole)
        file.write(whole.getvalue()[: whole.tell() // 2])
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)
    save(checkpoint, file)

torch.save = half
pretrain(load_config(sys.argv[1]))
"""


def repeatable(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in REPEATABLE if key in line} for line in lines]


def assert_same_run(interrupted: Path, whole: Path) -> None:
    assert repeatable(interrupted) == repeatable(whole)  # every line once, bit for bit
    one, other = (safetensors.torch.load_file(run / "objective.safetensors") for run in (interrupted, whole))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_kill_9_in_the_middle_of_a_checkpoint(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config("killed", knn_every=20)
    save_config(config, tmp_path / "asked.yaml")
    script = tmp_path / "killed.py"
    script.write_text(KILLED_WHILE_WRITING)
    child = subprocess.run(
        [sys.executable, script, tmp_path / "asked.yaml"], capture_output=True, text=True, check=False
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    folder = Path(config.output)
    (half_written,) = folder.glob("checkpoints/last.ckpt.*.tmp")
    assert repeatable(folder)[-1]["step"] == 15, "the kill left lines that the checkpoint of step 8 has not seen"

    pretrain(config)
    assert not half_written.exists()
    assert_same_run(folder, pretrain(make_config("whole", knn_every=20)))


@pytest.mark.parametrize("step", [4, 6])
def test_a_kill_right_after_the_last_checkpoint_loses_neither_best_nor_csv(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    accuracies = {0: 0.1, 2: 0.2, 4: 0.6, 6: 0.7 if step == 6 else 0.5}
    monkeypatch.setattr(OnlineKnn, "evaluate", lambda _, trainer, module: accuracies[trainer.global_step])
    save = AtomicCheckpointIO.save_checkpoint

    def save_and_die(io: AtomicCheckpointIO, checkpoint: dict[str, Any], path: Path, **_: object) -> None:
        save(io, checkpoint, path)
        if path.name == "last.ckpt" and checkpoint["global_step"] == step:
            raise ZeroDivisionError

    config = make_config("killed", steps=6, knn_every=2, checkpoint_every=2)
    with monkeypatch.context() as patched:
        patched.setattr(AtomicCheckpointIO, "save_checkpoint", save_and_die)
        with pytest.raises(ZeroDivisionError):
            pretrain(config)
    folder = pretrain(config)
    assert load_backbone(folder / "best")[1].step == step
    assert torch.load(folder / "checkpoints/best.ckpt", weights_only=True)["global_step"] == step
    assert len((folder / "metrics.csv").read_text().splitlines()) == 1 + len(repeatable(folder))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signal_saves_the_step_and_the_next_call_goes_on(
    make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: signal.Signals,
    code: int,
) -> None:
    config = make_config("stopped", steps=12)
    step = PretrainModule.training_step
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]

    def signalled(module: PretrainModule, *arguments: object) -> torch.Tensor:
        if module.global_step == 4:
            os.kill(os.getpid(), number)
        return step(module, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(PretrainModule, "training_step", signalled)
    with pytest.raises(SystemExit) as stopped:
        pretrain(config)
    monkeypatch.setattr(PretrainModule, "training_step", step)
    assert stopped.value.code == code
    assert "stopped at step 5" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    seconds = torch.load(Path(config.output) / "checkpoints/last.ckpt")["callbacks"]["Metrics"]["seconds"]

    folder = pretrain(config)
    assert "goes on at step 5" in capsys.readouterr().out
    assert_same_run(folder, pretrain(make_config("whole", steps=12)))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [line["seconds"] for line in lines]
    assert times == sorted(times), "seconds count all sittings together"
    assert next(line["seconds"] for line in lines if line["step"] == 6) > seconds


def test_workers_do_not_change_the_run(make_config: MakeConfig) -> None:
    one, other = pretrain(make_config("one", steps=4)), pretrain(make_config("other", steps=4, workers=2))
    assert_same_run(one, other)


def test_steps_and_processes_share_no_random_numbers() -> None:
    seeds = {step_seed(seed, step, rank) for seed in range(3) for step in range(50) for rank in range(4)}
    assert len(seeds) == 3 * 50 * 4


def test_a_signal_to_all_processes_of_a_job_is_one_to_the_run(make_config: MakeConfig, tmp_path: Path) -> None:
    """As a scheduler sends it: data workers that died of it would take the last step, and its checkpoint, along."""
    config = make_config("job", steps=100_000, workers=2, knn_every=0)
    save_config(config, tmp_path / "asked.yaml")
    program = (
        "import sys; from heatssl.config_file import load_config; from heatssl.training import pretrain\n"
        "pretrain(load_config(sys.argv[1]))"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "asked.yaml")]
    job = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
    written = Path(config.output) / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (written.exists() and written.read_text()) and job.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(job.pid, signal.SIGTERM)
    output, _ = job.communicate(timeout=60)
    assert job.returncode == 143, output
    assert "stopped at step" in output
    assert (Path(config.output) / "checkpoints/last.ckpt").exists()
