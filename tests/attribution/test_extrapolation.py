"""The file of a law's extrapolation: errors in units that mean something, weights that belong to it, nothing stale."""

from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch

from heatssl import objectives
from heatssl.attribution.extrapolation import load_objective, quarters_mean, relative_error, write_extrapolation
from heatssl.config import DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.errors import UserError
from heatssl.objectives import Extrapolation

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


def _write_run(folder: Path, **objective: object) -> Path:
    """A finished run that was never trained."""
    torch.manual_seed(0)
    config = PretrainConfig(data=DataConfig(image_size=32), backbone_arguments=dict(ARGUMENTS), objective=objective)
    folder.mkdir(exist_ok=True)
    save_config(config, folder / "config.yaml")
    safetensors.torch.save_file(objectives.build(config).state_dict(), folder / "objective.safetensors")
    return folder


def test_the_mean_of_everything_has_error_one_and_the_truth_none() -> None:
    seen = torch.randn(3, 8, 4, 4) * 5 + 100
    mean = seen.mean(dim=(0, 2, 3), keepdim=True).expand_as(seen)
    assert relative_error(mean, seen).mean() == pytest.approx(1, rel=1e-4)
    assert not relative_error(seen, seen).any()
    torch.testing.assert_close(relative_error(7 * mean, 7 * seen), relative_error(mean, seen), rtol=1e-3, atol=1e-3)


def test_the_mean_of_the_quarter_reads_the_quarter_alone() -> None:
    filled = torch.arange(16.0).view(1, 1, 4, 4)
    visible = torch.zeros(1, 4, 4, dtype=torch.bool)
    visible[:, :2, 2:] = True
    spread = quarters_mean(Extrapolation(filled, filled, visible))
    assert spread[0, 0].tolist() == [[4.5, 4.5, 2, 3], [4.5, 4.5, 6, 7], [4.5] * 4, [4.5] * 4]


def test_a_run_with_a_law_gets_its_file_and_one_without_loses_a_stale_one(tmp_path: Path) -> None:
    images, path = torch.randn(3, 3, 32, 32), tmp_path / "extrapolation.npz"
    run = _write_run(tmp_path / "run", name="heat_jepa")
    write_extrapolation(path, run, images, ["a", "b", "c"], chunk=2)
    arrays = np.load(path)
    assert arrays["image"].tolist() == ["a", "b", "c"]
    assert arrays["seen"].shape == arrays["filled"].shape == (3, 4, 4, 3)
    assert arrays["visible"][:, :2, :2].all()
    assert arrays["visible"].sum() == 12
    # Heat at rest is the quarter's mean: here the law is what it is held against.
    np.testing.assert_allclose(arrays["error"], arrays["error_of_mean"], rtol=1e-4)
    write_extrapolation(path, _write_run(tmp_path / "run", name="simmim"), images, ["a", "b", "c"], chunk=2)
    assert not path.exists()
    write_extrapolation(path, None, images, ["a", "b", "c"], chunk=2)
    assert not path.exists()


def test_weights_of_another_objective_are_refused(tmp_path: Path) -> None:
    run = _write_run(tmp_path / "run", name="heat_jepa")
    kept = (run / "config.yaml").read_text()
    _write_run(run, name="heat_jepa", channels=12)
    (run / "config.yaml").write_text(kept)
    with pytest.raises(
        UserError, match=r"objective\.safetensors does not hold the objective of config\.yaml.*to_field"
    ):
        load_objective(run)
    (run / "objective.safetensors").write_bytes(b"half")
    with pytest.raises(UserError, match="damaged"):
        load_objective(run)
    (run / "objective.safetensors").unlink()
    assert load_objective(run) is None, "a run that is not finished has none"
