"""If these fail, what heatssl export writes is another model than the one that was measured, or says something else."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from heatssl.backbones import create_backbone, pooled_features
from heatssl.cli import main
from heatssl.data.crop import centre_crop
from heatssl.export import BackboneInfo, load_backbone, save_backbone

VIT = ("vit_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8})
KINDS = {
    "vit": VIT,
    "gau": ("gau_tiny_patch16_224", {"depth": 2, "embed_dim": 48, "key_width": 16, "patch_size": 8}),
    "flash": ("flash_small_patch16_224", {"depth": 2, "embed_dim": 48, "key_width": 16, "patch_size": 8, "chunk": 2}),
    "roformer_v2": ("roformer_v2_small_patch16_224", {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}),
    "resnet": ("resnet10t", {}),
}
MEAN, STD = [0.5, 0.4, 0.3], [0.2, 0.25, 0.3]


def a_run(folder: Path, kind: str = "vit", size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    name, arguments = KINDS[kind]
    backbone = create_backbone(name, size, **arguments).eval()
    (folder / "config.yaml").touch()
    save_backbone(folder, backbone, BackboneInfo(name, size, arguments, MEAN, STD, step=7))
    return backbone


def classifier(folder: Path, kind: str) -> tuple[nn.Module, Tensor, Tensor]:
    """As heatssl finetune keeps it: (backbone, weight, bias)."""
    backbone, weight, bias = a_run(folder, kind), *(torch.randn(3, *shape) for shape in ((48,), ()))
    name, arguments = KINDS[kind]
    state = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    safetensors.torch.save_file(
        state | {"head.weight": weight, "head.bias": bias},
        folder / "finetuned.safetensors",
        {"backbone": BackboneInfo(name, 32, arguments).to_json(), "classes": json.dumps(["cat", "dog", "owl"])},
    )
    return backbone, weight, bias


@pytest.mark.parametrize("kind", list(KINDS))
def test_timm_makes_a_model_that_gives_what_was_measured(kind, tmp_path, capsys):
    backbone, images = a_run(tmp_path, kind), torch.randn(2, 3, 32, 32)
    assert main(["export", f"run={tmp_path}"]) == 0
    assert "-> mean over positions" in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), pooled_features(backbone, images))
    again, info = load_backbone(f"local-dir:{tmp_path / 'export'}")
    torch.testing.assert_close(pooled_features(again, images), pooled_features(backbone, images))
    assert (info.image_size, info.mean, info.std) == (32, MEAN, STD)


def test_timm_prepares_a_photograph_as_heatssl_does(tmp_path):
    a_run(tmp_path)
    assert main(["export", f"run={tmp_path}"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True)
    prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    slopes = np.add.outer(np.arange(90), 2 * np.arange(120))[..., None] % 256 // np.array([1, 2, 3])
    photograph = Image.fromarray(slopes.astype(np.uint8)).resize((60, 45)).resize((120, 90))  # smooth
    mean, std = torch.tensor(MEAN)[:, None, None], torch.tensor(STD)[:, None, None]
    found, ours = prepare(photograph) * std + mean, centre_crop(photograph, 32) / 255
    assert found.shape == (3, 32, 32)
    assert (found - ours).abs().mean() < 0.01, "one resizes before it crops"


@pytest.mark.parametrize("kind", ["vit", "gau"])
def test_a_classifier_keeps_its_logits_and_the_names_of_its_classes(kind, tmp_path):
    backbone, weight, bias = classifier(tmp_path, kind)
    assert main(["export", f"run={tmp_path}/finetuned.safetensors", f"output={tmp_path}/out"]) == 0
    model = timm.create_model(f"local-dir:{tmp_path}/out", pretrained=True).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(images), F.linear(pooled_features(backbone, images), weight, bias))
    assert model.pretrained_cfg["label_names"] == ["cat", "dog", "owl"]


@pytest.mark.parametrize("kind", ["vit", "gau"])
def test_another_size_is_written_as_it_is_evaluated(kind, tmp_path):
    a_run(tmp_path, kind)
    assert main(["export", f"run={tmp_path}", "image_size=48"]) == 0
    backbone, images = load_backbone(tmp_path)[0], torch.randn(2, 3, 48, 48)
    backbone.set_input_size(48)
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True).eval()
    torch.testing.assert_close(model(images), pooled_features(backbone, images))
    assert model.pretrained_cfg["input_size"][-1] == 48


def test_what_timm_says_of_its_own_weights_is_not_said_of_these(tmp_path):
    a_run(tmp_path)
    assert main(["export", f"run={tmp_path}"]) == 0
    configuration = json.loads((tmp_path / "export" / "config.json").read_text())["pretrained_cfg"]
    assert configuration["tag"] == "heatssl"
    assert "license" not in configuration
    text = (tmp_path / "export" / "README.md").read_text()
    assert "7 steps" in text
    assert "import heatssl" not in text, "timm alone loads a ViT"
    code = text.split("```python\n")[1].split("```")[0].replace("local-dir:.", f"local-dir:{tmp_path / 'export'}")
    found: dict = {"image": Image.new("RGB", (50, 40))}
    exec(code, found)
    assert found["output"].shape == (1, 48)


def test_a_model_whose_pooling_timm_fixes_says_so(tmp_path, capsys):
    """ConvNeXt norms after it has pooled, by weights that pretraining on maps has not touched."""
    arguments = {"depths": [1, 1, 1, 1], "dims": [8, 8, 16, 16]}
    save_backbone(
        tmp_path, create_backbone("convnext_atto", 32, **arguments), BackboneInfo("convnext_atto", 32, arguments)
    )
    (tmp_path / "config.yaml").touch()
    assert main(["export", f"run={tmp_path}"]) == 0
    assert "timm's own pooling; heatssl measures the mean of forward_features" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *(("vit", 32), ("gau", 32), ("flash", 32), ("roformer_v2", 32)),
        # More tokens than are mixed one by one, and chunks that do not fill the grid.
        *(("gau", 64), ("roformer_v2", 64), ("flash", 64), ("flash", 72)),
    ],
)
def test_onnx_gives_the_same_features_for_any_number_of_images(kind, size, tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone = a_run(tmp_path, kind, size)
    assert main(["export", f"run={tmp_path}", "formats=[onnx]"]) == 0
    session = onnxruntime.InferenceSession(tmp_path / "export" / "model.onnx")
    for number in (1, 3):
        images = torch.randn(number, 3, size, size)
        (found,) = session.run(["features"], {"images": images.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), pooled_features(backbone, images), atol=1e-5, rtol=1e-4)
    facts = session.get_modelmeta().custom_metadata_map
    assert (json.loads(facts["mean"]), json.loads(facts["std"])) == (MEAN, STD)
    assert not (tmp_path / "export" / "config.json").exists()


@pytest.mark.filterwarnings("ignore")
def test_onnx_of_a_classifier_has_logits_and_class_names(tmp_path):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    backbone, weight, bias = classifier(tmp_path, "vit")
    assert main(["export", f"run={tmp_path}/finetuned.safetensors", f"output={tmp_path}/out", "formats=[onnx]"]) == 0
    session, images = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx"), torch.randn(2, 3, 32, 32)
    (found,) = session.run(["logits"], {"images": images.numpy()})
    wanted = F.linear(pooled_features(backbone, images), weight, bias)
    torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-5, rtol=1e-4)
    assert json.loads(session.get_modelmeta().custom_metadata_map["classes"]) == ["cat", "dog", "owl"]


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["formats=[onix]"], "did you mean 'onnx'"),
        (["formats=[]"], "choose formats=[timm]"),
        (["image_size=30"], "24 or 32"),
        (["run=timm:vit_tiny_patch16_224?random"], "name an output=FOLDER"),
        (["run=nowhere"], "does not exist"),
    ],
)
def test_mistakes_are_told_in_one_line(settings, fix, tmp_path, capsys):
    a_run(tmp_path)
    assert main(["export", f"run={tmp_path}", *settings]) == 2
    complaint = capsys.readouterr().err
    assert fix in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "export").exists()


def test_without_onnx_the_remedy_is_named(tmp_path, capsys, monkeypatch):
    a_run(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    assert main(["export", f"run={tmp_path}", "formats=[onnx]"]) == 2
    assert "pip install 'heatssl[onnx]'" in capsys.readouterr().err
