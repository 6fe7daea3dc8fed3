"""MAE's linear probe: its optimiser, its normalisation and its selection are the paper's, or numbers do not compare."""

import dataclasses
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from heatssl.cli import main
from heatssl.config import DataConfig, ProbeConfig
from heatssl.evaluation import augmented_probe, load_probe, run_probe
from heatssl.evaluation.augmented_probe import Classifiers, lars
from heatssl.evaluation.checkpoint import Checkpoint
from heatssl.evaluation.results import read_results
from heatssl.evaluation.source import open_source
from heatssl.evaluation.split_features import split_features

DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)
QUICK = {"workers": 0, "protocol": "mae", "epochs": 2, "batch_size": 16, "data": DATA, "random_init": False}


def test_the_optimiser_is_that_of_mae() -> None:
    """LARS of MAE's util/lars.py, written out: q = 0.001 |p| / |g| for matrices, momentum 0.9 on q g."""
    torch.manual_seed(0)
    classifiers = Classifiers(6, 4, 1)
    optimizer = lars(classifiers, [0.7])
    x, y = torch.randn(50, 6), torch.randint(4, (50,))
    weight, bias = (parameter.detach().clone() for parameter in classifiers.heads[0].parameters())
    velocity = [torch.zeros_like(weight), torch.zeros_like(bias)]
    for _ in range(5):
        optimizer.zero_grad()
        F.cross_entropy(classifiers(x)[0], y).backward()
        optimizer.step()
        weight, bias = weight.requires_grad_(), bias.requires_grad_()
        standardised = (x - x.mean(0)) / (x.var(0, unbiased=False) + 1e-6).sqrt()
        gradients = torch.autograd.grad(F.cross_entropy(standardised @ weight.T + bias, y), [weight, bias])
        steps = [gradients[0] * 0.001 * weight.detach().norm() / gradients[0].norm(), gradients[1]]
        velocity = [0.9 * v + step for v, step in zip(velocity, steps, strict=True)]
        weight, bias = weight.detach() - 0.7 * velocity[0], bias.detach() - 0.7 * velocity[1]
    torch.testing.assert_close(classifiers.heads[0].weight.detach(), weight)
    torch.testing.assert_close(classifiers.heads[0].bias.detach(), bias)


def test_the_kept_probe_is_the_classifier_in_evaluation_mode() -> None:
    classifiers = Classifiers(6, 4, 2)
    for _ in range(20):
        classifiers(3 + 2 * torch.randn(64, 6))
    x = torch.randn(5, 6)
    probes = classifiers.probes()
    for probe, logits in zip(probes, classifiers.eval()(x), strict=True):
        torch.testing.assert_close(probe.logits(x), logits.detach())
    torch.testing.assert_close(probes[0].mean, torch.full((6,), 3.0), rtol=0.2, atol=0)


def test_each_rate_of_a_grid_is_trained_as_if_alone(run: Path) -> None:
    source = open_source(ProbeConfig(run=str(run), **QUICK))
    config = ProbeConfig(run=str(run), **QUICK)
    train = source.splits["train"]
    together = augmented_probe._train(source.backbone, train, source, config, [0.1, 3.0], "pretrained")
    (alone,) = augmented_probe._train(source.backbone, train, source, config, [3.0], "pretrained")
    torch.testing.assert_close(together[1].weight, alone.weight)
    assert not torch.allclose(together[0].weight, alone.weight)


def test_labels_are_learned_and_val_is_met_with_the_kept_probe(run: Path) -> None:
    data = dataclasses.replace(DATA, train_size=20)
    settings = QUICK | {"data": data, "epochs": 40, "batch_size": 20, "grid": [1e-3, 100.0], "held_out": 0.5}
    (result,) = run_probe(ProbeConfig(run=str(run), **settings))
    source = open_source(ProbeConfig(run=str(run), **settings))
    probe, classes = load_probe(run / "augmented_probe.safetensors")
    assert classes == source.splits["train"].classes
    x, y = split_features(source.backbone, "val", source, 256)
    assert result.accuracy == pytest.approx((probe.logits(x).argmax(1) == y).float().mean().item())
    assert result.metric == "linear (MAE)"
    assert result.train_size == 10, "the held-out half selects and is not trained on"
    for said in (
        "random crops of 8 to 100 % and flips for 40 epochs (MAE's protocol)",
        "learning rate 100 x 20 / 256 = 7.8125 (100 of 0.001, 100 selected on 50 % of train, on which",
        "4.44 epochs of warm-up",
        "10 train, 40 val images",
    ):
        assert said in result.protocol
    x, y = split_features(source.backbone, "train", source, 256)
    assert (probe.logits(x).argmax(1) == y).float().mean() > 0.3, "of ten classes"
    assert not (run / "probe.safetensors").exists()


class InterruptedRunError(Exception):
    """As if the machine had gone down."""


def test_after_an_interruption_it_goes_on_as_if_nothing_had_been(write_run, tmp_path, monkeypatch, capsys) -> None:
    real = Checkpoint.save
    weights = []
    for name in ("whole", "parts"):
        config = ProbeConfig(run=str(write_run(tmp_path / name)), **QUICK)
        if name == "parts":

            def save(self, step):
                real(self, step)
                raise InterruptedRunError

            monkeypatch.setattr(Checkpoint, "save", save)
            with pytest.raises(InterruptedRunError):
                run_probe(config)
            monkeypatch.setattr(Checkpoint, "save", real)
        run_probe(config)
        weights.append(load_file(tmp_path / name / "augmented_probe.safetensors"))
        assert not list((tmp_path / name).glob("*.ckpt"))
    assert "going on from step 5 of" in capsys.readouterr().out
    torch.testing.assert_close(weights[1], weights[0], rtol=0, atol=0)


def test_the_command_line_on_any_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["data=shapes", "data.train_size=20", "data.val_size=20", "workers=0", "epochs=1", "batch_size=10"]
    output = tmp_path / "out"
    assert main(["probe", "run=timm:test_resnet?random", *words, f"output={output}", "protocol=mae"]) == 0
    assert "linear (MAE)  random_init" in capsys.readouterr().out
    (entry,) = read_results(output / "evaluation.json")
    assert "LARS, learning rate 0.1 x 10 / 256 = 0.00390625" in entry["protocol"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["protocol=lars"], "choose one of features, mae"),
        (["protocol=mae", "head=block"], "leave head and solver out"),
        (["protocol=mae", "shots=5"], "leave the others out"),
        (["protocol=mae", "epochs=0"], "epochs be at least 1"),
        (["protocol=mae", "grid=[0.1,inf]"], "grid must hold positive numbers"),
        (["depth=4"], "no other head has any"),
        (["head=block", "depth=0"], "one block or more"),
    ],
)
def test_what_cannot_work_is_named(
    run: Path, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    assert main(["probe", f"run={run}", "workers=0", *words]) == 2
    assert message in capsys.readouterr().err
