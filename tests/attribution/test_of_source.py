"""What a command takes from its source: a run's own law, and baselines that no batch changes."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from heatssl import objectives
from heatssl.attribution.extrapolation import load_objective
from heatssl.backbones import feature_map
from heatssl.cli import main
from heatssl.config import AttributeConfig, DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.data import open_split
from heatssl.evaluation.source import open_source
from heatssl.export import load_backbone

DATA = DataConfig(image_size=32, train_size=20, val_size=20, workers=0)
ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def with_objective(run: Path, **objective: object) -> None:
    """Let the run have been of an objective, whose law is a random one."""
    torch.manual_seed(0)
    config = PretrainConfig(data=DATA, backbone_arguments=dict(ARGUMENTS), objective=objective)
    built = objectives.build(config)
    built.backbone.load_state_dict(load_backbone(run)[0].state_dict())
    save_config(config, run / "config.yaml")
    safetensors.torch.save_file(built.state_dict(), run / "objective.safetensors")


def attribute(run: Path, *words: str) -> list[dict[str, object]]:
    assert main(["attribute", f"run={run}", "workers=0", "size=32", "count=2", *words]) == 0
    return json.loads((run / "attribution" / "attribution.json").read_text())["maps"]


def raw(run: Path, entry: dict[str, object]) -> np.ndarray:
    return np.load((run / str(entry["file"])).with_suffix(".npy"))


@pytest.mark.parametrize("name", ["qb_heat", "finola"])
def test_the_law_is_that_of_the_run_and_the_column_says_which(run: Path, name: str) -> None:
    with_objective(run, name=name)
    (first, *_) = attribute(run, "--method", "law_residual")
    law = type(load_objective(run).law).__name__
    assert first["options"] == f"law={law}"
    settings = AttributeConfig(run=str(run), workers=0)
    source, objective = open_source(settings), load_objective(run)
    index = int(str(first["image"])[4:9])
    image = torch.from_numpy(np.array(open_split(DATA, "val").load(index))).permute(2, 0, 1)[None] / 255
    image = (image - torch.tensor(DATA.mean).view(3, 1, 1)) / torch.tensor(DATA.std).view(3, 1, 1)
    with torch.no_grad():
        wanted = objective.law.residual(objective.to_field(feature_map(source.backbone, image)))[0]
    np.testing.assert_allclose(raw(run, first), wanted, rtol=1e-3, atol=1e-6)
    plain = attribute(run, "--method", "law_residual", "law=laplace")[2]
    assert plain["options"] == ""
    assert not np.allclose(raw(run, plain), raw(run, first), rtol=1e-2)


def test_without_a_law_it_is_laplace_and_no_other_can_be_asked_for(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with_objective(run, name="heat_jepa")
    assert attribute(run, "--method", "law_residual")[0]["options"] == ""
    for words, message in {
        ("law_residual", "law=run"): "law=run, but there is none of the final map of",
        ("law_residual", "law=heat"): "law=heat is none: use run, or laplace",
        ("gradcam", "law=run"): "gradcam takes no law: leave it out, or use one of law_residual",
    }.items():
        assert main(["attribute", f"run={run}", "workers=0", "--method", *words]) == 2
        assert message in capsys.readouterr().err
