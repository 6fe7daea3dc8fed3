"""Each objective runs through the real command line, from generated images to a report."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from heatssl import cli, objectives
from heatssl.training import pictures

BACKBONE = "backbone_arguments={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}"
SMALL = {  # the papers' heads and decoders are large
    "mae": ["objective.decoder_width=24", "objective.decoder_depth=1", "objective.decoder_heads=2"],
    "lejepa": ["objective.head_width=16", "objective.local_views=1"],
}
PAINTED = {"image", "label", "story", "visible", "reconstruction"}
VIEWS = {"image", "label", "story", "first_view", "second_view"}
PICTURES = {
    "mae": PAINTED,
    "simmim": PAINTED,
    "qb_heat": {*PAINTED, "law_residual"},
    "finola": {*PAINTED, "law_residual"},
    "heat_completion": {*PAINTED, "law_residual", "from_rest"},
    "heat_jepa": {"image", "label", "story", "visible", "law_residual"},
    "simclr": VIEWS,
    "lejepa": VIEWS,
}


@pytest.mark.parametrize("name", objectives.names())
def test_pretrain_and_report(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = ["data.image_size=32", "data.train_size=16", "data.val_size=10", "data.workers=0"]
    trainer = ["trainer.steps=3", "trainer.batch_size=4", "trainer.log_every=1", "trainer.knn_every=0"]
    run = tmp_path / "run"
    words = [f"objective={name}", *SMALL.get(name, []), BACKBONE, *data, *trainer, "trainer.accelerator=cpu"]
    assert cli.main(["pretrain", *words, f"output={run}"]) == 0, capsys.readouterr().err
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert np.isfinite(line["train/loss"])
        assert {"health/rankme", "health/channel_std"} <= set(line)
    shown = np.load(run / "pictures.npz")
    assert set(shown.files) == PICTURES[name]
    assert cli.main(["report", f"run={run}"]) == 0
    page = (run / "report.html").read_text()
    assert ("law residual" in page) == ("law_residual" in shown.files)
    assert "cannot be read" not in page


def test_channel_statistics_reach_the_objective() -> None:
    from heatssl.composition import compose
    from heatssl.training.run import build_module

    config = compose("pretrain", ["objective=simclr", "data.image_size=32", BACKBONE, "data.mean=[0.1,0.2,0.3]"])
    objective = build_module(config).objective
    assert (objective.mean, objective.std) == ([0.1, 0.2, 0.3], config.data.std)


def test_pictures_are_the_same_whenever_they_are_drawn(tmp_path: Path) -> None:
    from heatssl.composition import compose
    from heatssl.data import open_split
    from heatssl.training.run import build_module

    settings = ["objective=simmim", "data.image_size=32", BACKBONE, "data.val_size=10", "data.workers=0"]
    config = compose("pretrain", settings)
    objective, data = build_module(config).objective, open_split(config.data, "val")
    following = []
    for seed, file in enumerate(("one.npz", "other.npz")):
        torch.manual_seed(seed)
        pictures.write_pictures(tmp_path / file, objective, data, config.data)
        following.append(torch.rand(()).item())
    assert following[0] != following[1], "the run's own random numbers go on"
    one, other = np.load(tmp_path / "one.npz"), np.load(tmp_path / "other.npz")
    assert np.array_equal(one["visible"], other["visible"])


def test_an_objective_with_nothing_to_show_ends_with_its_images_alone(tmp_path: Path, monkeypatch) -> None:
    """Who writes a loss alone must not lose a run to its pictures, after the last step."""
    from heatssl.composition import compose
    from heatssl.data import open_split
    from heatssl.objectives import Objective
    from heatssl.training.run import build_module

    config = compose("pretrain", ["objective=simmim", "data.image_size=32", BACKBONE, "data.val_size=10"])
    objective, data = build_module(config).objective, open_split(config.data, "val")
    monkeypatch.setattr(type(objective), "maps", Objective.maps)
    pictures.write_pictures(tmp_path / "pictures.npz", objective, data, config.data)
    assert set(np.load(tmp_path / "pictures.npz").files) == {"image", "label", "story"}
