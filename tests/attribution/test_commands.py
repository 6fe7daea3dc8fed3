"""``heatssl attribute`` writes the pictures that people look at and the list that the report reads."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from heatssl.attribution import method_names, run_attribute
from heatssl.backbones import create_backbone
from heatssl.config import AttributeConfig, DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.data import open_split
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe, save_probe
from heatssl.evaluation.source import fingerprint
from heatssl.export import BackboneInfo, save_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=20, val_size=20, workers=0)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained run with a probe that was never trained either."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(tmp_path, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std))
    save_config(PretrainConfig(data=DATA, backbone_arguments=dict(ARGUMENTS)), tmp_path / "config.yaml")
    probe = LinearProbe(torch.randn(10, 24), torch.zeros(10), torch.zeros(24), torch.ones(24))
    save_probe(tmp_path / "probe.safetensors", probe, open_split(DATA, "val").classes, fingerprint(backbone))
    return tmp_path


def _config(run: Path, **settings: object) -> AttributeConfig:
    return AttributeConfig(**({"run": str(run), "count": 2, "steps": 4, "size": 64, "workers": 0} | settings))


def _maps(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "attribution" / "attribution.json").read_text())["maps"]


def test_every_map_is_listed_and_is_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_attribute(_config(run)) == run / "attribution"
    maps = _maps(run)
    assert [entry["method"] for entry in maps] == ["gradcam"] * 2 + ["integrated_gradients"] * 2
    assert len({entry["image"] for entry in maps}) == len({entry["label"] for entry in maps}) == 2
    for entry in maps:
        assert Image.open(run / str(entry["file"])).height == 64
        assert str(entry["target"]).startswith("self: ")
        assert (entry["completeness_error"] is None) == (entry["method"] == "gradcam")
    printed = capsys.readouterr().out
    for entry in maps[2:]:
        assert f"{entry['completeness_error']:.2%}" in printed


def test_every_method_is_at_hand_on_the_command_line(run: Path) -> None:
    run_attribute(_config(run, methods=method_names()))
    entries = _maps(run)
    assert {entry["method"] for entry in entries} == set(method_names())
    with_error = {entry["method"] for entry in entries if entry["completeness_error"] is not None}
    assert with_error == {"integrated_gradients", "layer_integrated_gradients"}


def test_a_second_target_adds_and_a_second_run_replaces(run: Path) -> None:
    run_attribute(_config(run, methods=["gradcam"]))
    run_attribute(_config(run, methods=["gradcam"], target="probe"))
    run_attribute(_config(run, methods=["gradcam"]))
    assert len(_maps(run)) == len({entry["file"] for entry in _maps(run)}) == 4


def test_class_and_second_image_as_targets(run: Path, tmp_path: Path) -> None:
    data = open_split(DATA, "val")
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    data.load(0).save(first)
    data.load(1).save(second)
    run_attribute(_config(run, images=[str(first)], target=str(second), methods=["gradcam"]))
    run_attribute(_config(run, images=[str(first)], target=data.classes[3], methods=["gradcam"]))
    run_attribute(_config(run, images=[str(first)], target="probe", methods=["gradcam"]))
    targets = [str(entry["target"]) for entry in _maps(run)]
    assert "second.png" in targets[0]
    assert data.classes[3] in targets[1]
    assert {entry["image"] for entry in _maps(run)} == {str(first)}


def test_bad_input_names_the_fix(run: Path) -> None:
    for message, settings in {
        "did you mean 'gradcam'": {"methods": ["gradcan"]},
        "did you mean": {"target": "trianglee"},
        "cannot be read": {"images": [str(run / "config.yaml")]},
        "at least 1": {"count": 0},
    }.items():
        with pytest.raises(UserError, match=message):
            run_attribute(_config(run, **settings))
    assert not (run / "attribution").exists()


def test_a_missing_probe_or_one_of_other_weights_is_refused(run: Path) -> None:
    torch.manual_seed(1)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(run, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std))
    with pytest.raises(UserError, match="other weights"):
        run_attribute(_config(run, target="probe"))
    (run / "probe.safetensors").unlink()
    with pytest.raises(UserError, match="heatssl probe run="):
        run_attribute(_config(run, target="probe"))
