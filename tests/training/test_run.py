"""What stands in a run folder, and what is refused before the first step."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from heatssl.config import PretrainConfig
from heatssl.errors import UserError
from heatssl.export import load_backbone
from heatssl.training import pretrain
from heatssl.training.checks import check_batch, claim_folder
from heatssl.training.metrics import read
from heatssl.training.run import build_module

MakeConfig = Callable[..., PretrainConfig]


def test_run_folder_holds_what_report_and_evaluation_read(
    make_config: MakeConfig,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    config = make_config()
    folder = pretrain(config)
    lines = read(folder / "metrics.jsonl")
    logged = [line for line in lines if "train/loss" in line]
    assert [line["step"] for line in logged] == [3, 6, 9, 12, 15, 18, 20]
    assert [line["step"] for line in lines if "knn/accuracy" in line] == [0, 10, 20]
    assert {"epoch", "seconds", "train/lr", "train/images_per_second", "train/data_wait"} <= set(logged[0])
    assert {"loss/hidden", "health/rankme", "health/channel_std", "health/law_residual"} <= set(logged[0])
    assert logged[-1]["epoch"] == 20 * 8 / 80
    assert logged[-1]["train/lr"] == pytest.approx(config.optimizer.final_learning_rate)
    assert all(0 <= line["train/data_wait"] <= 1 for line in logged)
    assert logged[-1]["train/loss"] < logged[0]["train/loss"]
    assert len((folder / "metrics.csv").read_text().splitlines()) == len(lines) + 1

    backbone, info = load_backbone(folder)
    assert (info.name, info.image_size, info.step) == ("vit_tiny_patch16_224", 32, 20)
    assert info.arguments == config.backbone_arguments
    assert load_backbone(folder / "best")[1].step in (10, 20)
    objective = build_module(config).objective
    objective.load_state_dict(safetensors.torch.load_file(folder / "objective.safetensors"))
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), objective.backbone.parameters(), strict=True))

    pictures = np.load(folder / "pictures.npz")
    for name in ("image", "visible", "reconstruction"):
        assert pictures[name].shape == (8, 32, 32, 3)
        assert pictures[name].dtype == np.uint8
    assert pictures["law_residual"].shape[0] == 8
    assert len(set(pictures["label"])) == 8, "one picture of each class before the second of any"

    files = {path.name for path in folder.iterdir()}
    assert files == {
        "config.yaml", "metrics.jsonl", "metrics.csv", "checkpoints", "backbone.safetensors", "backbone.json",
        "best_backbone.safetensors", "best_backbone.json", "objective.safetensors", "pictures.npz",
    }  # fmt: skip
    assert {path.name for path in (folder / "checkpoints").iterdir()} == {"last.ckpt", "best.ckpt"}
    assert [path.name for path in tmp_path.iterdir()] == ["run"], "nothing is written outside the run folder"

    printed = capsys.readouterr()
    shown = [line for line in printed.out.splitlines() if line.startswith("step ")]
    assert len(shown) == 7
    assert all(word in shown[-1] for word in ("20/20", "loss", "kNN", "img/s", "data wait", "ETA"))
    assert "weight decay 0.05 on" in printed.out
    assert "Lightning" not in printed.out + printed.err
    assert "Trainer" not in printed.out + printed.err

    # The same command once more neither trains nor writes.
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}
    assert pretrain(config) == folder
    assert "finished" in capsys.readouterr().out
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "config.yaml"}

    # Killed between the last checkpoint and the last file: only the files are made.
    (folder / "pictures.npz").unlink()
    pretrain(config)
    assert (folder / "pictures.npz").exists()
    assert read(folder / "metrics.jsonl") == lines

    with pytest.raises(UserError, match="resume=auto"):
        pretrain(dataclasses.replace(config, resume="never"))
    (folder / "config.yaml").rename(folder / "elsewhere.yaml")
    with pytest.raises(UserError, match="resume=auto"):
        pretrain(dataclasses.replace(config, resume="never"))
    (folder / "elsewhere.yaml").rename(folder / "config.yaml")
    other = dataclasses.replace(config, seed=1, optimizer=dataclasses.replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(UserError, match=r"different run.*learning_rate.*seed.*output="):
        pretrain(other)
    assert read(folder / "metrics.jsonl") == lines, "a refusal loses nothing"
    # What changes no result is no other run.
    assert pretrain(dataclasses.replace(config, trainer=dataclasses.replace(config.trainer, log_every=1))) == folder


def test_vectors_and_positions_are_not_decayed(make_config: MakeConfig) -> None:
    module = build_module(make_config())
    decayed = {
        id(parameter)
        for group in module.optimizer.param_groups
        if group["weight_decay"]
        for parameter in group["params"]
    }
    for name, parameter in module.objective.named_parameters():
        free = parameter.ndim <= 1 or name.endswith(("pos_embed", "cls_token", "law.raw_decay", "law.raw_rotation"))
        assert (id(parameter) in decayed) != free, name
    assert module.decay.decayed + module.decay.free == sum(p.numel() for p in module.objective.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "trainer.steps=0"),
        ({"batch_size": 0}, "trainer.batch_size=0"),
        ({"precision": "16"}, "unknown trainer.precision '16'.*32, bf16"),
        ({"accelerator": "tpus"}, "unknown trainer.accelerator 'tpus'"),
        ({"learning_rate": -1.0}, "optimizer.learning_rate"),
        ({"knn_train_size": 0}, "trainer.knn_train_size=0"),
        ({"knn_val_size": 0}, "trainer.knn_val_size=0"),
        ({"resume": "yes"}, "unknown resume 'yes'.*auto, never"),
        ({"image_size": 40}, "quartered"),
        ({"backbone": "vit_tinny_patch16_224"}, "vit_tiny_patch16_224"),
        ({"accelerator": "mps" if torch.cuda.is_available() else "cuda"}, "is not to be had here.*accelerator=auto"),
        ({"crop_scale": [0.9, 0.1]}, "data.crop_scale"),
        ({"learning_rate": math.nan}, "optimizer.learning_rate=nan"),
        ({"gradient_clip": math.nan}, "trainer.gradient_clip=nan"),
        ({"colour_jitter": 2.0}, "data.colour_jitter=2.0 must be between 0 and 1"),
        ({"learning_rate": 1e-6}, "optimizer.final_learning_rate=1e-05 is above the peak"),
        ({"betas": [0.9]}, r"optimizer.betas=\[0.9\]: adamw takes 2"),
        ({"betas": [0.9, 1.5]}, "optimizer.betas=.*below 1"),
        ({"betas": [math.nan, 0.9]}, "optimizer.betas=.*below 1"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**63}, "seed=9223372036854775808"),
        ({"expected": "demmo"}, "expected=demmo.*did you mean 'demo'"),
        ({"expected": "nonsense"}, "expected=nonsense.*choose one of demo"),
        ({"objective": {"name": "heat_jepa"}, "batch_size": 1}, "trainer.batch_size=1.*trainer.batch_size=2"),
        ({"objective": {"name": "simclr"}, "batch_size": 1}, "trainer.batch_size=1.*trainer.batch_size=2"),
    ],
)
def test_what_no_run_can_have_is_refused_and_writes_nothing(
    make_config: MakeConfig, settings: dict[str, object], message: str
) -> None:
    config = make_config(**settings)
    with pytest.raises(UserError, match=message):
        pretrain(config)
    assert not Path(config.output).exists()


def test_what_stopped_before_its_first_line_does_not_block_its_folder(make_config: MakeConfig) -> None:
    config = make_config(steps=1)
    claim_folder(make_config(steps=2))
    assert pretrain(config) == Path(config.output)


def test_unknown_optimizer_names_the_nearest(make_config: MakeConfig) -> None:
    config = make_config()
    config.optimizer.name = "adamww"
    with pytest.raises(UserError, match="did you mean 'adamw'"):
        pretrain(config)


def test_one_image_is_enough_on_two_devices_and_for_a_teacher(make_config: MakeConfig) -> None:
    for settings, devices in (({"name": "simclr"}, 2), ({"name": "heat_jepa", "against_collapse": "teacher"}, 1)):
        config = make_config(objective=settings, batch_size=1, devices=devices)
        check_batch(config, build_module(config).objective)


def test_output_that_is_a_file(make_config: MakeConfig) -> None:
    config = make_config()
    Path(config.output).write_text("mine")
    with pytest.raises(UserError, match="output="):
        pretrain(config)
    assert Path(config.output).read_text() == "mine"


def test_checkpoint_of_another_architecture_names_both(make_config: MakeConfig) -> None:
    config = make_config(steps=4)
    folder = pretrain(config)
    wider = make_config("wider", steps=4, backbone_arguments={**config.backbone_arguments, "embed_dim": 96})
    other = pretrain(wider)
    (folder / "checkpoints/last.ckpt").replace(other / "checkpoints/last.ckpt")
    with pytest.raises(UserError, match=r"embed_dim=48.*embed_dim=96"):
        pretrain(wider)


def test_damaged_checkpoint_is_named(make_config: MakeConfig) -> None:
    folder = pretrain(make_config(steps=2, knn_every=0))
    (folder / "checkpoints/last.ckpt").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match=r"last\.ckpt is damaged"):
        pretrain(make_config(steps=2, knn_every=0))


def test_bf16_trains(make_config: MakeConfig) -> None:
    folder = pretrain(make_config(steps=6, precision="bf16", knn_every=0))
    losses = [line["train/loss"] for line in read(folder / "metrics.jsonl") if "train/loss" in line]
    assert losses[-1] < losses[0]
    assert not (folder / "best_backbone.safetensors").exists()
    weights = safetensors.torch.load_file(folder / "backbone.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())


@pytest.mark.slow
def test_compiled_weights_keep_their_names(make_config: MakeConfig) -> None:
    folder = pretrain(make_config(steps=2, compile=True, knn_every=0))
    assert not any("_orig_mod" in key for key in safetensors.torch.load_file(folder / "backbone.safetensors"))
    load_backbone(folder)
