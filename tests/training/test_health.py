"""A run that goes wrong stops with its evidence kept."""

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heatssl.config import PretrainConfig
from heatssl.errors import UserError
from heatssl.objectives import Outputs
from heatssl.training import pretrain
from heatssl.training.metrics import read
from heatssl.training.module import PretrainModule
from heatssl.training.run import build_module

MakeConfig = Callable[..., PretrainConfig]


@pytest.mark.parametrize("part", ["loss", "gradient"])
def test_nan_dumps_batch_and_weights_and_stops(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, part: str
) -> None:
    config = make_config(steps=8, precision="bf16", knn_every=0)
    objective_class = type(build_module(config).objective)
    forward, calls = objective_class.forward, []

    def spoiled(objective: torch.nn.Module, images: torch.Tensor) -> Outputs:
        outputs = forward(objective, images)
        if objective.training:  # not the pass before the first step
            calls.append(outputs)
        if len(calls) < 4:
            return outputs
        if part == "loss":
            return outputs._replace(loss=outputs.loss * math.nan)
        return outputs._replace(loss=outputs.loss + (outputs.loss - outputs.loss.detach()).abs().sqrt())

    monkeypatch.setattr(objective_class, "forward", spoiled)
    with pytest.raises(UserError, match=rf"{part} became nan at step 3.*step_3\.pt.*learning_rate=.*precision=32"):
        pretrain(config)
    dump = torch.load(Path(config.output) / "nan_dump/step_3.pt", weights_only=True)
    assert dump["step"] == 3
    assert dump["images"].shape == (8, 3, 32, 32)
    assert dump["images"].dtype == torch.uint8
    assert len(dump["indices"]) == 8
    assert "loss/hidden" in dump["logs"]
    assert all(tensor.isfinite().all() for tensor in dump["objective"].values()), "the weights of before the step"


def test_a_line_holds_the_mean_over_its_steps(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    losses, step = [], PretrainModule.training_step

    def noted(module: PretrainModule, *arguments: object) -> torch.Tensor:
        losses.append(step(module, *arguments))  # type: ignore[arg-type]
        return losses[-1]

    monkeypatch.setattr(PretrainModule, "training_step", noted)
    lines = read(pretrain(make_config(steps=5, knn_every=0)) / "metrics.jsonl")
    assert [line["step"] for line in lines] == [3, 5]
    assert lines[0]["train/loss"] == pytest.approx(sum(loss.item() for loss in losses[:3]) / 3)
    assert lines[1]["train/loss"] == pytest.approx(sum(loss.item() for loss in losses[3:]) / 2)


def test_gradients_are_clipped(make_config: MakeConfig) -> None:
    module = build_module(make_config(gradient_clip=0.5))
    outputs = module.objective(torch.randn(8, 3, 32, 32))
    (1000 * outputs.loss).backward()
    module.outputs = outputs
    module.configure_gradient_clipping(module.optimizer)
    norm = torch.stack([p.grad.norm() for p in module.objective.parameters() if p.grad is not None]).norm()
    assert module.gradient_norm > 0.5
    assert norm == pytest.approx(0.5, rel=1e-4)
