"""``image_size=``: frozen weights on images of another size than in training, a result of its own."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from heatssl.backbones import create_backbone, pooled_features, set_input_size
from heatssl.cli import main
from heatssl.config import DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.data import eval_loader, normalise, open_split
from heatssl.errors import UserError
from heatssl.evaluation import knn_accuracy
from heatssl.export import BackboneInfo, load_backbone, save_backbone

DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)
UNITS = {"depth": 2, "embed_dim": 24, "key_width": 16, "patch_size": 8}
KINDS = {"gau_tiny_patch16_224": UNITS, "resnet10t": {"output_stride": 8, "channels": [8, 8, 8, 16]}}


def results(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "evaluation.json").read_text())["results"]


def of_kind(folder: Path, name: str) -> Path:
    folder.mkdir()
    torch.manual_seed(3)
    save_backbone(
        folder, create_backbone(name, 32, **KINDS[name]), BackboneInfo(name, 32, KINDS[name], DATA.mean, DATA.std)
    )
    save_config(PretrainConfig(data=DATA, backbone=name, backbone_arguments=KINDS[name]), folder / "config.yaml")
    return folder


@pytest.mark.parametrize("kind", ["vit", *KINDS])
def test_knn_at_another_size_is_that_of_features_of_such_images(run: Path, kind: str, tmp_path: Path) -> None:
    run = run if kind == "vit" else of_kind(tmp_path / "kind", kind)
    for words in ([], ["image_size=64"], ["image_size=32"]):
        assert main(["knn", f"run={run}", "random_init=false", "workers=0", *words]) == 0
    before, after = results(run)  # the newest last: that of 32 px was measured once more
    assert "at 32 px" in str(after["backbone"])
    assert "at 64 px" in str(before["backbone"])
    assert "features at 64 px" in str(before["protocol"])
    backbone, _ = load_backbone(run)
    set_input_size(backbone, 64)
    data = DataConfig(image_size=64, train_size=80, val_size=40, workers=0)
    sides = []
    for split in ("train", "val"):
        (batch,) = eval_loader(open_split(data, split), data, batch_size=80)
        with torch.no_grad():
            sides += [pooled_features(backbone, normalise(batch.images, data)), batch.labels]
    assert before["accuracy"] == pytest.approx(knn_accuracy(*sides, temperature=0.07))


def test_a_probe_of_another_size_is_a_file_of_its_own(run: Path) -> None:
    words = [f"run={run}", "workers=0"]
    assert main(["probe", *words, "image_size=64"]) == 0
    assert (run / "64px_probe.safetensors").exists()
    assert not (run / "probe.safetensors").exists()
    twins = [result for result in results(run) if result["weights"] == "random_init"]
    assert [str(result["backbone"])[-8:] for result in twins] == ["at 64 px"]
    assert main(["attribute", *words, "target=probe", "count=1", "methods=[gradcam]", "image_size=64"]) == 0
    entry = json.loads((run / "attribution" / "attribution.json").read_text())["maps"][0]
    assert entry["file"].startswith("attribution/64px_000_gradcam_probe")


def test_heatmaps_of_larger_images_have_more_positions_and_lie_beside_the_others(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"run={run}", "workers=0", "count=1", "methods=[gradcam]"]
    for more in ([], ["image_size=64"]):
        assert main(["attribute", *words, *more]) == 0
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    shapes = [np.load((run / entry["file"]).with_suffix(".npy")).shape for entry in maps]
    assert shapes == [(4, 4), (8, 8)]
    assert [entry["options"] for entry in maps] == ["", "64 px"], "what the pages tell columns apart by"
    capsys.readouterr()
    assert main(["attribute", *words, "target=probe", "image_size=64"]) == 2, "there is no probe of that size"


def test_scores_of_larger_images_stand_beside_the_others(run: Path) -> None:
    words = [f"run={run}", "workers=0", "count=1", "methods=[gradcam]", "scores=[energy]", "score_count=4"]
    for more in ([], ["image_size=64"]):
        assert main(["attribute", *words, *more]) == 0
    rows = json.loads((run / "attribution" / "scores.json").read_text())["scores"]
    assert [(row["method"], row["options"]) for row in rows] == [
        ("gradcam", ""),
        ("centre", ""),
        ("gradcam", "64 px"),
        ("centre", "64 px"),
    ]


def test_a_table_of_several_is_of_one_size(run: Path, tmp_path: Path, write_run: Callable[..., Path]) -> None:
    other = write_run(tmp_path / "other", 4)
    assert main(["evaluate", str(run), str(other), f"output={tmp_path / 'table'}", "image_size=48", "workers=0"]) == 0
    rows = json.loads((tmp_path / "table" / "results.json").read_text())["results"]
    assert len(rows) == 4
    assert all("at 48 px" in row["backbone"] and "features at 48 px" in row["protocol"] for row in rows)


def test_finetuning_at_another_size_gives_weights_of_that_size(run: Path) -> None:
    words = ["epochs=1", "batch_size=16", "workers=0", "image_size=48", "drop_path=0"]
    assert main(["finetune", f"run={run}", *words]) == 0
    backbone, info = load_backbone(run / "48px_finetuned.safetensors")
    assert info.image_size == 48
    assert backbone(torch.zeros(1, 3, 48, 48)).shape == (1, 24)


@pytest.mark.parametrize("settings", [{}, {"pos_embed": "learn"}, {"positions": "interpolated"}], ids=str)
def test_finetuning_at_another_size_starts_from_what_the_weights_compute_there(
    settings: dict[str, str], tmp_path: Path
) -> None:
    """A gau of softmax_plus knows how many patches are usual: those of its training, whatever it is made for."""
    name, arguments = "gau_tiny_patch16_224", UNITS | settings
    torch.manual_seed(3)
    info = BackboneInfo(name, 32, arguments, DATA.mean, DATA.std)
    save_backbone(tmp_path, create_backbone(name, 32, **arguments), info)
    config = PretrainConfig(data=DATA, backbone=name, backbone_arguments=arguments)
    save_config(config, tmp_path / "config.yaml")
    words = ["epochs=1", "batch_size=16", "workers=0", "image_size=64", "learning_rate=1e-20", "weight_decay=0"]
    assert main(["finetune", f"run={tmp_path}", *words, "ema=0", "random_init=true"]) == 0
    images = torch.randn(2, 3, 64, 64)
    tuned, _ = load_backbone(tmp_path / "64px_finetuned.safetensors")
    own, _ = load_backbone(tmp_path)
    set_input_size(own, 64)
    torch.testing.assert_close(pooled_features(tuned, images), pooled_features(own, images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["image_size=36"], "image_size=36 is not a whole number of 8-pixel patches: use 32 or 40"),
        (["image_size=0"], "image_size=0 is not a whole number of 8-pixel patches: use 8 or 8"),
        (["data=shapes", "data.image_size=64"], "data.image_size has no effect with knn, set image_size instead"),
    ],
)
def test_sizes_that_do_nothing_are_named(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["knn", f"run={run}", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1


def test_a_model_of_one_size_says_so() -> None:
    backbone = create_backbone("mixer_s32_224", 224)
    with pytest.raises(UserError, match=r"MlpMixer cannot see images of 256 pixels \(.+\): leave image_size out"):
        set_input_size(backbone.train(), 256)
    assert backbone.training


def test_a_size_and_back_is_the_model_as_it_was_where_positions_are_rotary() -> None:
    torch.manual_seed(0)
    backbone = create_backbone("gau_tiny_patch16_224", 32, **UNITS).eval()
    images = torch.randn(2, 3, 32, 32)
    before = backbone(images)
    set_input_size(backbone, 64)
    assert backbone(torch.randn(2, 3, 64, 64)).shape == (2, 24)
    set_input_size(backbone, 32)
    assert torch.equal(backbone(images), before)
