"""Two processes make the step that their mean gradient asks for."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from heatssl.config import PretrainConfig
from heatssl.config_file import load_config, save_config
from heatssl.data import augment, normalise, open_split, train_loader
from heatssl.training.module import step_seed
from heatssl.training.run import build_module

MakeConfig = Callable[..., PretrainConfig]

SCRIPT = """
import os, sys
import safetensors.torch
from heatssl.config_file import load_config
from heatssl.training import run

fit = run.fit

def fit_and_keep(config, train, module, resume):
    fit(config, train, module, resume)
    weights = {key: value.cpu().contiguous() for key, value in module.objective.state_dict().items()}
    safetensors.torch.save_file(weights, f"{sys.argv[2]}/rank{os.environ['RANK']}.safetensors")

run.fit = fit_and_keep
run.pretrain(load_config(sys.argv[1]))
"""


@pytest.mark.slow
def test_two_processes(make_config: MakeConfig, tmp_path: Path) -> None:
    config = make_config(steps=1, log_every=1, knn_every=1, gradient_clip=0.0, warmup_steps=0, learning_rate=0.1)
    config.optimizer.name = "sgd"
    save_config(config, tmp_path / "asked.yaml")
    (tmp_path / "two.py").write_text(SCRIPT)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    arguments = [tmp_path / "two.py", tmp_path / "asked.yaml", tmp_path]
    run = subprocess.run([sys.executable, *command, *arguments], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout.count("step 1/1") == 1, "only the first process speaks"
    folder = Path(config.output)
    assert load_config(folder / "config.yaml").trainer.devices == 2
    counts = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["bad_files"]
    assert counts == [{"names": [], "seen": 8, "bad": 0}] * 2, "each process has its own"

    module = build_module(config)
    data = open_split(config.data, "train")
    losses = []
    for rank in (0, 1):
        loader = train_loader(data, config.data, batch_size=8, seed=config.seed, rank=rank, world=2)
        batch = next(iter(loader))  # first: a loader that starts draws a random number of its own
        torch.manual_seed(step_seed(config.seed, 0, rank))
        images = normalise(augment(batch.images, config.data), config.data)
        losses.append(module.objective(images).loss / 2)
        losses[-1].backward()
    module.optimizer.step()
    wanted = module.objective.state_dict()
    one, other = (safetensors.torch.load_file(tmp_path / f"rank{rank}.safetensors") for rank in (0, 1))
    for key, value in wanted.items():
        assert torch.equal(one[key], other[key]), key
        torch.testing.assert_close(one[key], value, rtol=1e-4, atol=1e-6, msg=key)
    assert any((one[key] - build_module(config).objective.state_dict()[key]).abs().max() > 1e-5 for key in one)

    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1]
    assert lines[1]["train/loss"] == pytest.approx(sum(loss.item() for loss in losses), rel=1e-5)
    assert lines[1]["epoch"] == 16 / 80


KILLED_ON_THE_WAY = """
import os, sys
from heatssl.config_file import load_config
from heatssl.training import run
from heatssl.training.checkpoint import Checkpoints

after_step = Checkpoints.on_train_batch_end

def killed(self, trainer, *arguments):
    after_step(self, trainer, *arguments)
    if trainer.global_step == 3:
        os._exit(1)

if len(sys.argv) > 2:
    Checkpoints.on_train_batch_end = killed
run.pretrain(load_config(sys.argv[1]))
"""


@pytest.mark.slow
def test_averages_of_a_resumed_run_are_those_of_each_process(make_config: MakeConfig, tmp_path: Path) -> None:
    """The checkpoint of step 2 lies between two lines: each process must go on with the sums of its own images."""
    (tmp_path / "killed.py").write_text(KILLED_ON_THE_WAY)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    losses = []
    for name, ways in (("killed", (["kill"], [])), ("whole", ([],))):
        config = make_config(name, steps=4, log_every=4, checkpoint_every=2, knn_every=0)
        save_config(config, tmp_path / f"{name}.yaml")
        for way in ways:
            words = [*command, tmp_path / "killed.py", tmp_path / f"{name}.yaml", *way]
            run = subprocess.run(words, capture_output=True, text=True, check=False)
            assert (run.returncode != 0) == bool(way), run.stderr
            if way:
                first, second = torch.load(Path(config.output) / "checkpoints/last.ckpt", weights_only=True)["health"]
                assert first["count"] == second["count"] == 2
                assert first["sums"]["train/loss"] != second["sums"]["train/loss"]
        lines = [json.loads(line) for line in (Path(config.output) / "metrics.jsonl").read_text().splitlines()]
        losses.append([(line["step"], line["train/loss"]) for line in lines if "train/loss" in line])
    assert losses[0] == losses[1]
    assert losses[0][0][0] == 4
