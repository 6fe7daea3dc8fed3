"""Targets of the classifier that the weights came with, from the command line: what a classifier's user asks first."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from heatssl.attribution import explain
from heatssl.attribution.pictures import read_picture
from heatssl.cli import main
from heatssl.config import AttributeConfig
from heatssl.evaluation.finetune import Classifier
from heatssl.evaluation.source import open_source
from heatssl.export import load_backbone


@pytest.fixture(scope="module")
def model() -> nn.Module:
    """A classifier of seven classes."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=7).eval()


@pytest.fixture(params=["folder", "file"])
def weights(request: pytest.FixtureRequest, model: nn.Module, tmp_path: Path) -> str:
    if request.param == "folder":
        timm.models.save_for_hf(model, tmp_path / "hub", model_config={"num_classes": 7}, safe_serialization=True)
        return f"local-dir:{tmp_path / 'hub'}"
    safetensors.torch.save_file(model.state_dict(), tmp_path / "weights.safetensors")
    return f"{tmp_path / 'weights.safetensors'}?test_vit"


@pytest.fixture
def photograph(tmp_path: Path) -> str:
    file = tmp_path / "photograph.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (160, 160, 3), dtype=np.uint8)).save(file)
    return str(file)


def attribute(photograph: str, weights: str, folder: Path, *words: str) -> int:
    words = (f"output={folder}", "--method", "gradcam", "size=32", "accelerator=cpu", *words)
    return main(["attribute", photograph, "--model", weights, *words])


def seen(photograph: str, weights: str) -> Tensor:
    """The image as the backbone is shown it."""
    config = AttributeConfig(run=weights, images=[photograph], accelerator="cpu")
    return read_picture(photograph, open_source(config, needs_data=False))[None]


@pytest.mark.parametrize("target", ["logit", "logit:3", "margin", "entropy"])
def test_the_map_is_that_of_the_whole_model(
    model: nn.Module, weights: str, photograph: str, tmp_path: Path, target: str
) -> None:
    assert attribute(photograph, weights, tmp_path / "out", f"target={target}") == 0
    (entry,) = json.loads((tmp_path / "out" / "attribution" / "attribution.json").read_text())["maps"]
    assert "the model's own classifier" in entry["target"]
    image = seen(photograph, weights)
    with torch.no_grad():
        wanted = {"logit": model(image).argmax(dim=1), "logit:3": 3}.get(target, target)
    raw = np.load((tmp_path / "out" / entry["file"]).with_suffix(".npy"))
    np.testing.assert_allclose(raw, explain(model, image, "gradcam", wanted).maps[0], rtol=1e-3, atol=1e-7)


def test_it_can_be_scored_against_random_weights(weights: str, photograph: str, tmp_path: Path) -> None:
    """The random twin needs a classifier as well."""
    assert attribute(photograph, weights, tmp_path / "out", "target=logit", "scores=[randomisation,deletion]") == 0
    rows = json.loads((tmp_path / "out" / "attribution" / "scores.json").read_text())["scores"]
    assert {row["score"] for row in rows if row["method"] == "gradcam"} == {"randomisation", "deletion"}


def test_a_class_that_is_not_there_is_named(
    weights: str, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert attribute(photograph, weights, tmp_path / "out", "target=logit:7") == 2
    assert "has 7 classes: choose one from 0 to 6" in capsys.readouterr().err


def test_weights_without_a_classifier_are_refused(
    run: Path, model: nn.Module, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("head.")}
    safetensors.torch.save_file(state, tmp_path / "headless.safetensors")
    headless = f"{tmp_path / 'headless.safetensors'}?test_vit"
    for weights in (headless, str(run), f"{run / 'backbone.safetensors'}"):
        assert attribute(photograph, weights, tmp_path / "out", "target=logit") == 2
        assert "can be explained: use target=self, or train one" in capsys.readouterr().err
    assert attribute(photograph, headless, tmp_path / "out", "target=margin") == 2
    assert "run `heatssl probe " in capsys.readouterr().err


def test_margins_are_those_of_a_probe_where_there_is_one(run: Path) -> None:
    assert main(["attribute", f"run={run}", "methods=[gradcam]", "count=1", "workers=0", "target=margin"]) == 0
    (entry,) = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    assert entry["target"] == "margin: logit of the image's class minus the largest other"


@pytest.fixture
def finetuned(run: Path, tmp_path: Path) -> str:
    """What ``heatssl finetune`` writes: backbone, head, and the names of three classes."""
    backbone, info = load_backbone(run)
    tensors = {f"backbone.{key}": value for key, value in backbone.state_dict().items()}
    tensors |= {"head.weight": torch.randn(3, 24), "head.bias": torch.randn(3)}
    metadata = {"classes": json.dumps(["cat", "dog", "bird"]), "backbone": info.to_json()}
    safetensors.torch.save_file(tensors, tmp_path / "finetuned.safetensors", metadata=metadata)
    return str(tmp_path / "finetuned.safetensors")


@pytest.mark.parametrize("target", ["logit", "logit:2", "bird", "margin", "entropy"])
def test_a_classifier_of_finetune_is_explained(
    run: Path, finetuned: str, photograph: str, tmp_path: Path, target: str
) -> None:
    """It was refused: no classifier can be explained."""
    assert attribute(photograph, finetuned, tmp_path / "out", f"target={target}") == 0
    (entry,) = json.loads((tmp_path / "out" / "attribution" / "attribution.json").read_text())["maps"]
    assert "the classifier of finetuned.safetensors" in entry["target"]
    tensors = safetensors.torch.load_file(finetuned)
    backbone, _ = load_backbone(run)
    classifier = Classifier(backbone, 3).eval()
    classifier.load_state_dict(tensors)
    image = seen(photograph, finetuned)

    class Wanted:
        uses_classifier = False

        def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
            logits = classifier(points)
            best, second = logits.topk(2, dim=1)[0].unbind(dim=1)
            entropy = -(logits.softmax(dim=1) * logits.log_softmax(dim=1)).sum(dim=1)
            return {"logit": best, "margin": best - second, "entropy": entropy}.get(target, logits[:, 2])

    raw = np.load((tmp_path / "out" / entry["file"]).with_suffix(".npy"))
    np.testing.assert_allclose(raw, explain(backbone, image, "gradcam", Wanted()).maps[0], rtol=1e-3, atol=1e-7)


def test_a_class_that_finetune_has_not_seen_is_named(
    finetuned: str, photograph: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for target, message in {"logit:3": "has 3 classes: choose one from 0 to 2", "birt": "did you mean 'bird'"}.items():
        assert attribute(photograph, finetuned, tmp_path / "out", f"target={target}") == 2
        assert message in capsys.readouterr().err
