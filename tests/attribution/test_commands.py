"""``heatssl attribute`` writes the pictures that people look at and the list that the report reads."""

import json
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms.v2.functional import pil_to_tensor as to_tensor

from heatssl.attribution import commands, explain, method_names, points, run_attribute
from heatssl.attribution.overlay import picture_of
from heatssl.backbones import create_backbone
from heatssl.cli import main
from heatssl.config import AttributeConfig, DataConfig
from heatssl.data import normalise, open_split
from heatssl.errors import UserError
from heatssl.export import BackboneInfo, keep_backbone, load_backbone, save_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=20, val_size=20, workers=0)


def _config(run: Path, **settings: object) -> AttributeConfig:
    given = {"run": str(run), "size": 64, "workers": 0} | settings
    methods = given.get("methods", AttributeConfig().methods)
    given |= {} if given.get("images") else {"count": given.get("count", 2)}
    return AttributeConfig(**({"steps": 4} if {"ig", "integrated_gradients"} & set(methods) else {}), **given)


def _maps(run: Path) -> list[dict[str, object]]:
    return json.loads((run / "attribution" / "attribution.json").read_text())["maps"]


def test_every_map_is_listed_and_is_a_picture(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_attribute(_config(run)) == run / "attribution"
    maps = _maps(run)
    assert [entry["method"] for entry in maps] == ["gradcam"] * 2 + ["integrated_gradients"] * 2 + ["heat_flow"] * 2
    assert len({entry["image"] for entry in maps}) == len({entry["label"] for entry in maps}) == 2
    for entry in maps:
        assert Image.open(run / str(entry["file"])).height == 64
        assert str(entry["target"]).startswith("self: ")
        assert (entry["completeness_error"] is not None) == (entry["method"] == "integrated_gradients")
    printed = capsys.readouterr().out
    for entry in maps[2:4]:
        assert f"{entry['completeness_error']:.2%}" in printed


def test_maps_are_listed_as_asked_for_and_a_heat_flow_is_that_of_its_base(run: Path) -> None:
    methods = ["heat_flow:heat_flow:rise", "heat_flow:rise", "rise"]
    run_attribute(_config(run, methods=methods, samples=4))
    maps = _maps(run)
    assert [entry["method"] for entry in maps] == [method for method in methods for _ in range(2)]
    backbone, _ = load_backbone(run)
    image = normalise(to_tensor(open_split(DATA, "val").load(int(str(maps[0]["image"])[4:9])))[None], DATA)
    for entry in maps[::2]:
        raw = np.load((run / str(entry["file"])).with_suffix(".npy"))
        assert raw == pytest.approx(explain(backbone, image, entry["method"], samples=4).maps[0].numpy(), abs=1e-5)


def test_the_raw_map_and_the_photo_lie_beside_the_overlay(run: Path) -> None:
    run_attribute(_config(run))
    backbone, _ = load_backbone(run)
    data = open_split(DATA, "val")
    for entry in _maps(run):
        index = int(str(entry["image"])[4:9])
        image = normalise(to_tensor(data.load(index))[None], DATA)
        raw = np.load((run / str(entry["file"])).with_suffix(".npy"))
        options = {"steps": 4} if entry["method"] == "integrated_gradients" else {}
        wanted = explain(backbone, image, str(entry["method"]), **options).maps[0]
        np.testing.assert_allclose(raw, wanted, rtol=1e-3, atol=1e-6)
        shown = np.asarray(Image.open(run / str(entry["photo"])))
        assert np.array_equal(shown, np.asarray(data.load(index)))


def test_images_that_must_not_be_passed_on_are_nowhere(run: Path) -> None:
    run_attribute(_config(run, over_image=False))
    assert not list(run.glob("attribution/photo_*"))
    assert {entry["photo"] for entry in _maps(run)} == {None}


def test_checkpoints_are_explained_one_after_the_other(run: Path) -> None:
    for step in (0, 5):
        torch.manual_seed(step + 1)
        backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
        keep_backbone(run, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std, step))
    backbone, info = load_backbone(run)
    save_backbone(run, backbone, replace(info, step=9))
    run_attribute(_config(run, methods=["gradcam"], checkpoints=True))
    listed = json.loads((run / "attribution" / "attribution.json").read_text())
    assert [entry["step"] for entry in listed["checkpoints"]] == [0, 0, 5, 5, 9, 9]
    assert [entry["step"] for entry in listed["maps"]] == [9, 9]
    first, last = (np.load((run / listed["checkpoints"][i]["file"]).with_suffix(".npy")) for i in (0, 4))
    final = np.load((run / listed["maps"][0]["file"]).with_suffix(".npy"))
    assert np.allclose(last, final)
    assert not np.allclose(first, final)
    with pytest.raises(UserError, match="fits one checkpoint only: use target=self"):
        run_attribute(_config(run, target="probe", checkpoints=True))
    run_attribute(_config(run, methods=["gradcam"]))
    again = json.loads((run / "attribution" / "attribution.json").read_text())
    assert again["checkpoints"] == listed["checkpoints"], "they stay until they are made anew"


def test_a_run_that_kept_one_step_says_how_to_keep_more(run: Path) -> None:
    with pytest.raises(UserError, match=r"one step only: pretrain with trainer\.keep_every=N"):
        run_attribute(_config(run, checkpoints=True))
    with pytest.raises(UserError, match="is no run and has no checkpoints"):
        run_attribute(_config(run / "backbone.safetensors", output=str(run), data=DATA, checkpoints=True))


def test_the_command_line_ends_in_a_gallery(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [f"run={run}", "count=2", "steps=2", "size=64", "workers=0", "accelerator=cpu"]
    assert main(["attribute", *words]) == 0
    gallery = run / "attribution" / "gallery.html"
    assert capsys.readouterr().out.endswith(f"-> {gallery}\n")
    assert gallery.read_text().count('<a class="cell') == 2 * 4
    assert main(["attribute", *words, "checkpoints=true"]) == 2
    assert "trainer.keep_every=N" in capsys.readouterr().err


def test_every_method_is_at_hand_on_the_command_line(run: Path) -> None:
    run_attribute(_config(run, methods=method_names()))
    entries = _maps(run)
    assert {entry["method"] for entry in entries} == set(method_names())
    with_error = {entry["method"] for entry in entries if entry["completeness_error"] is not None}
    assert with_error == {"integrated_gradients", "layer_integrated_gradients"}


def test_a_bar_stands_over_methods_and_over_the_points_of_each(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Minutes of occlusion without a sign of life look like a hang."""
    bars: list[tuple[str, int]] = []

    def bar(items: Sequence[object], name: str, **_: object) -> Sequence[object]:
        bars.append((name, len(items)))
        return items

    monkeypatch.setattr(commands, "progress_bar", bar)
    monkeypatch.setattr(points, "progress_bar", bar)
    run_attribute(_config(run, methods=["gradcam", "integrated_gradients"], batch_size=1))
    assert ("heatmaps", 2) in bars
    assert ("points", 2 * 4) in bars  # images and steps


def test_integrated_gradients_answer_to_ig(run: Path) -> None:
    run_attribute(_config(run, methods=["ig", "integrated_gradients", "heat_flow:uniform"]))
    assert [entry["method"] for entry in _maps(run)] == ["integrated_gradients"] * 2 + ["heat_flow:uniform"] * 2
    assert all((run / str(entry["file"])).is_file() and ":" not in str(entry["file"]) for entry in _maps(run))


def test_a_second_target_adds_and_a_second_run_replaces(run: Path) -> None:
    run_attribute(_config(run, methods=["gradcam"]))
    run_attribute(_config(run, methods=["gradcam"], target="probe"))
    run_attribute(_config(run, methods=["gradcam"]))
    assert len(_maps(run)) == len({entry["file"] for entry in _maps(run)}) == 4


def test_best_and_last_weights_lie_side_by_side(run: Path) -> None:
    """The maps of one would else be shown beside those of the other, as if they were of the same weights."""
    torch.manual_seed(1)
    best = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    info = BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std, step=3)
    save_backbone(run, best, info, prefix="best_")
    for weights in (run, run / "best"):
        run_attribute(_config(weights, methods=["gradcam"]))
    maps = _maps(run)
    assert [(entry["source"], entry["step"]) for entry in maps] == [("last", 0)] * 2 + [("best", 3)] * 2
    last, of_best = (np.load((run / str(maps[i]["file"])).with_suffix(".npy")) for i in (0, 2))
    assert not np.allclose(last, of_best)
    features = np.load(run / "attribution" / "features.npz")
    assert (str(features["source"]), int(features["step"])) == ("best", 3)


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


def told_command(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The words behind ``heatssl`` of the command that an error names."""
    return shlex.split(capsys.readouterr().err.split("`")[1])[1:]


def test_the_best_weights_have_a_probe_of_their_own(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The advice used to be the probe of the last weights, refused for ever; that of the best ones broke the last."""
    torch.manual_seed(1)
    best = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(run, best, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std), prefix="best_")
    words = ["methods=[gradcam]", "count=2", "size=64", "workers=0", "target=probe"]
    assert main(["attribute", f"run={run}/best", *words]) == 2
    told = told_command(capsys)
    assert told == ["probe", f"run={run}/best"]
    assert main([*told, "workers=0", "random_init=false", "cache=false"]) == 0
    assert main(["attribute", f"run={run}/best", *words]) == 0
    assert main(["attribute", f"run={run}", *words]) == 0
    assert [entry["source"] for entry in _maps(run)] == ["best"] * 2 + ["last"] * 2


def test_a_probe_that_an_older_heatssl_kept_for_the_best_weights_is_found(run: Path) -> None:
    backbone, info = load_backbone(run)
    save_backbone(run, backbone, info, prefix="best_")  # of which probe.safetensors is
    run_attribute(_config(run / "best", methods=["gradcam"], target="probe"))
    assert str(_maps(run)[0]["target"]).startswith("probe")


def test_weights_outside_a_run_name_all_that_their_probe_needs(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_split(DATA, "val").load(0).save(tmp_path / "image.png")
    elsewhere = tmp_path / "else where"
    words = [str(tmp_path / "image.png"), f"run={run}/backbone.safetensors", f"output={elsewhere}", "target=probe"]
    assert main(["attribute", *words]) == 2
    told = told_command(capsys)
    assert told == ["probe", *words[1:2], "data=folder", "data.root=PATH", words[2]]
    told[2:4] = ["data=shapes", "data.train_size=20", "data.val_size=20"]
    assert main([*told, "workers=0", "random_init=false", "cache=false"]) == 0
    assert main(["attribute", *words, "methods=[gradcam]"]) == 0
    assert main(["attribute", words[0], "--model", "timm:test_vit?random", words[2], "target=probe"]) == 2
    assert "random weights are others each time: use target=self" in capsys.readouterr().err


def test_a_missing_probe_or_one_of_other_weights_is_refused(run: Path) -> None:
    torch.manual_seed(1)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(run, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std))
    with pytest.raises(UserError, match="other weights"):
        run_attribute(_config(run, target="probe"))
    (run / "probe.safetensors").unlink()
    with pytest.raises(UserError, match="heatssl probe run="):
        run_attribute(_config(run, target="probe"))


def test_a_method_that_cannot_work_is_told_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Maps of the methods before it used to lie there, listed nowhere."""
    words = [f"run={run}", "workers=0", "count=2", "size=32", "layer=blocks.9", "--method", "saliency,gradcam,layercam"]
    assert main(["attribute", *words]) == 2
    told = capsys.readouterr().err
    assert "gradcam: VisionTransformer has no layer 'blocks.9'" in told
    assert "leave out gradcam, layercam, the other methods can do this" in told
    assert told.count("\n") == 1
    assert not (run / "attribution").exists()


@pytest.mark.parametrize("words", [["methods=[]"], ["--method", ""], ["--method", ":"]])
def test_no_method_is_refused(run: Path, words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attribute", f"run={run}", "workers=0", *words]) == 2
    assert "no method is named: use some of attention_rollout" in capsys.readouterr().err


def test_a_heat_flow_without_a_base_is_no_column_of_its_own(run: Path) -> None:
    run_attribute(_config(run, methods=["heat_flow:", "heat_flow"]))
    assert [entry["method"] for entry in _maps(run)] == ["heat_flow"] * 2


def test_images_that_must_not_be_passed_on_leave_the_folder(run: Path) -> None:
    """An earlier command's photo stayed there, in the overlays, and in the page."""
    run_attribute(_config(run, methods=["gradcam"], size=48))
    entry = _maps(run)[0]
    before = np.asarray(Image.open(run / str(entry["file"])))
    old = {**entry, "file": "attribution/old.png"}  # an older heatssl kept no array
    Image.new("RGB", (8, 8)).save(run / "attribution" / "old.png")
    listed = {"maps": [*_maps(run), old]}
    (run / "attribution" / "attribution.json").write_text(json.dumps(listed))
    run_attribute(_config(run, methods=["eigencam"], over_image=False))
    assert not list(run.glob("attribution/photo_*"))
    assert [entry["method"] for entry in _maps(run)] == ["gradcam"] * 2 + ["eigencam"] * 2
    assert {entry["photo"] for entry in _maps(run)} == {None}
    raw = np.load((run / str(entry["file"])).with_suffix(".npy"))
    after = np.asarray(Image.open(run / str(entry["file"])))
    assert np.array_equal(after, np.asarray(picture_of(raw, None, size=48)))
    assert not np.array_equal(after, before)
    assert not (run / "attribution" / "old.png").exists()
