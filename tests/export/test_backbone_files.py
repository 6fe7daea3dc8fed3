"""Backbones go out and come back the same, or say why not."""

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from heatssl.backbones import create_backbone
from heatssl.errors import UserError
from heatssl.export import BackboneInfo, is_run, load_backbone, save_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
INFO = BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, [0.5, 0.4, 0.3], [0.2, 0.2, 0.2], step=7)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "config.yaml").touch()
    save_backbone(tmp_path, create_backbone(INFO.name, INFO.image_size, **ARGUMENTS), INFO)
    return tmp_path


def test_round_trip(run: Path) -> None:
    backbone, info = load_backbone(run)
    assert info == INFO
    assert not backbone.training
    again, _ = load_backbone(str(run))
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(backbone(images), again(images))


def test_plain_timm_loads_the_file(run: Path) -> None:
    """The weights are usable without heatssl."""
    model = timm.create_model(INFO.name, num_classes=0, img_size=INFO.image_size, **ARGUMENTS)
    model.load_state_dict(safetensors.torch.load_file(run / "backbone.safetensors"))


def test_a_run_whose_arguments_name_a_size_of_their_own_still_loads(tmp_path: Path) -> None:
    """New runs are refused such arguments, but older ones were trained with them."""
    (tmp_path / "config.yaml").touch()
    info = BackboneInfo(INFO.name, 32, ARGUMENTS | {"img_size": 64})
    save_backbone(tmp_path, create_backbone(INFO.name, 64, **ARGUMENTS), info)
    assert load_backbone(tmp_path)[0].patch_embed.img_size == (64, 64)


@pytest.mark.parametrize(
    ("number", "then"),
    [(1, {"norm_place": "post", "value_activation": "silu", "mixed_share": 1.0}), (2, {"mixed_share": 1.0})],
)
def test_gated_units_of_earlier_formats_are_what_they_were(number: int, then: dict[str, Any], tmp_path: Path) -> None:
    """Their defaults were others, and the same weights would be another model's."""
    (tmp_path / "config.yaml").touch()
    units = {"depth": 2, "embed_dim": 48, "key_width": 16, "patch_size": 8}
    alpha = create_backbone("gau_tiny_patch16_224", 32, **units, **then).eval()
    save_backbone(tmp_path, alpha, BackboneInfo("gau_tiny_patch16_224", 32, units, format=f"heatssl-backbone-{number}"))
    images = torch.randn(1, 3, 32, 32)
    for source in (tmp_path, tmp_path / "backbone.safetensors"):
        assert torch.equal(load_backbone(source)[0](images), alpha(images))


def test_names_of_a_compiled_wrapper_do_not_reach_the_file(tmp_path: Path) -> None:
    wrapped = torch.compile(create_backbone(INFO.name, INFO.image_size, **ARGUMENTS))
    save_backbone(tmp_path, wrapped, INFO)
    load_backbone(tmp_path)


def test_best_stands_beside_last(run: Path) -> None:
    with pytest.raises(UserError, match=r"no best weights.*knn_every"):
        load_backbone(run / "best")
    backbone = create_backbone(INFO.name, INFO.image_size, **ARGUMENTS)
    save_backbone(run, backbone, BackboneInfo(**{**vars(INFO), "step": 3}), prefix="best_")
    assert load_backbone(run / "best")[1].step == 3
    assert load_backbone(run)[1].step == 7


def test_missing_folder_and_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_backbone(tmp_path / "absent")
    with pytest.raises(UserError, match="does not exist"):
        load_backbone(tmp_path / "absent/best")
    with pytest.raises(UserError, match="not a run folder"):
        load_backbone(tmp_path)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(UserError, match="first checkpoint"):
        load_backbone(tmp_path)


def test_mismatch_names_both_architectures(run: Path) -> None:
    description = json.loads((run / "backbone.json").read_text())
    description["arguments"]["embed_dim"] = 96
    (run / "backbone.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=r"embed_dim=48.*embed_dim=96.*instead of"):
        load_backbone(run)


def test_damaged_files_are_named(run: Path) -> None:
    (run / "backbone.safetensors").write_bytes(b"1234")
    with pytest.raises(UserError, match=r"backbone\.safetensors is damaged"):
        load_backbone(run)
    (run / "backbone.json").write_text("{}")
    with pytest.raises(UserError, match=r"backbone\.json describes no backbone"):
        load_backbone(run)
    (run / "backbone.json").write_text(json.dumps({**vars(INFO), "format": "other-2"}))
    with pytest.raises(UserError, match="other-2"):
        load_backbone(run)


def test_timm_random_follows_the_seed() -> None:
    torch.manual_seed(0)
    backbone, info = load_backbone("timm:resnet10t?random")
    torch.manual_seed(0)
    again, _ = load_backbone("timm:resnet10t?random")
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))
    assert info.name == "resnet10t"
    assert info.image_size == timm.get_pretrained_cfg("resnet10t").input_size[-1]
    assert len(info.mean) == len(info.std) == 3


def test_timm_errors_name_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="did you mean 'resnet10t'"):
        load_backbone("timm:resnett10t?random")
    with pytest.raises(UserError, match=r"only option is \?random"):
        load_backbone("timm:resnet10t?best")
    with pytest.raises(UserError, match=r"no pretrained weights for vit_giant_patch14_224.*\?random"):
        load_backbone("timm:vit_giant_patch14_224")

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr("heatssl.export.backbone_files.create_backbone", offline)
    with pytest.raises(UserError, match=r"could not be loaded \(ConnectionError\).*\?random"):
        load_backbone("timm:resnet10t")


@pytest.fixture
def plain() -> nn.Module:
    """A model of timm's with a classifier, as others publish them."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7)


def same_features(backbone: nn.Module, model: nn.Module) -> bool:
    found, expected = backbone.state_dict(), model.state_dict()
    return all(torch.equal(found[key], expected[key]) for key in found) and len(expected) == len(found) + 2


@pytest.mark.parametrize("kind", ["safetensors", "pth", "wrapped"])
def test_a_file_of_weights_with_a_name_of_timms(plain: nn.Module, tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights?.pth")
    state = plain.state_dict()
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save({"model": state} if kind == "wrapped" else state, path)
    backbone, info = load_backbone(f"{path}?test_vit")
    assert same_features(backbone, plain)
    assert (info.name, info.image_size) == ("test_vit", timm.get_pretrained_cfg("test_vit").input_size[-1])
    assert not is_run(f"{path}?test_vit")


def test_a_folder_as_timm_saves_it(plain: nn.Module, tmp_path: Path) -> None:
    timm.models.save_for_hf(plain, tmp_path, model_config={"num_classes": 7}, safe_serialization=True)
    backbone, info = load_backbone(f"local-dir:{tmp_path}")
    assert same_features(backbone, plain)
    assert info.image_size == plain.pretrained_cfg["input_size"][-1]


def test_a_file_that_heatssl_wrote_describes_itself(tmp_path: Path) -> None:
    backbone = create_backbone(INFO.name, INFO.image_size, **INFO.arguments)
    save_backbone(tmp_path, backbone, INFO)
    moved = (tmp_path / "backbone.safetensors").rename(tmp_path / "elsewhere.safetensors")
    again, info = load_backbone(moved)
    assert info == INFO
    assert all(torch.equal(a, b) for a, b in zip(backbone.parameters(), again.parameters(), strict=True))


def test_a_classifier_that_does_not_describe_itself_is_read_by_name(plain: nn.Module, tmp_path: Path) -> None:
    """As ``heatssl finetune`` wrote them at first; the advice to write FILE?NAME must be of use."""
    path = tmp_path / "finetuned.safetensors"
    inside = {f"backbone.{key}": value for key, value in plain.state_dict().items() if not key.startswith("head.")}
    safetensors.torch.save_file(inside | {"head.weight": torch.zeros(7, 3)}, path)
    with pytest.raises(UserError, match=r"finetuned\.safetensors\?NAME"):
        load_backbone(path)
    assert same_features(load_backbone(f"{path}?test_vit")[0], plain)


def test_files_that_cannot_be_used_are_named(plain: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="there is no file"):
        load_backbone(path)
    torch.save(plain.state_dict(), path)
    with pytest.raises(UserError, match=r"weights\.pth\?NAME"):
        load_backbone(path)
    with pytest.raises(UserError, match=r"does not hold weights of test_vit2: .* is missing"):
        load_backbone(f"{path}?test_vit2")
    with pytest.raises(UserError, match="did you mean 'test_vit"):
        load_backbone(f"{path}?test_vitt")
    torch.save(plain.state_dict() | {"decoder.weight": torch.zeros(1)}, path)
    with pytest.warns(UserWarning, match=r"1 tensors that test_vit lacks are left out, decoder\.weight first"):
        load_backbone(f"{path}?test_vit")
    path.write_text("nothing")
    with pytest.raises(UserError, match="cannot be read as weights"):
        load_backbone(f"{path}?test_vit")
    with pytest.raises(UserError, match=r"is no folder: give one with config\.json"):
        load_backbone(f"local-dir:{tmp_path / 'nowhere'}")


def test_a_distilled_model_has_two_classifiers(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    """timm names both, and they answer together: neither is missing, and neither is foreign to the model."""
    name = "deit_tiny_distilled_patch16_224"
    safetensors.torch.save_file(timm.create_model(name, num_classes=7).state_dict(), tmp_path / "weights.safetensors")
    backbone, _ = load_backbone(f"{tmp_path / 'weights.safetensors'}?{name}", classifier=True)
    assert backbone.num_classes == 7
    load_backbone(f"{tmp_path / 'weights.safetensors'}?{name}")
    assert not [str(warning.message) for warning in recwarn if "left out" in str(warning.message)]
