"""``heatssl attribute score=true``: the table is what papers quote, so every number is recomputed another way."""

import csv
import json
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.metrics import average_precision_score
from torch import Tensor, nn

from heatssl.attribution import attribute, run_attribute, score, scoring
from heatssl.cli import main
from heatssl.config import AttributeConfig, DataConfig
from heatssl.data import balanced_subset, eval_loader, normalise, open_masked
from heatssl.errors import UserError
from heatssl.evaluation.source import fingerprint
from heatssl.export import load_backbone

Create = Callable[..., nn.Module]
DATA = DataConfig(image_size=32, train_size=20, val_size=20, workers=0)


def config(run: Path, **settings: object) -> AttributeConfig:
    given = {"run": str(run), "size": 64, "workers": 0, "methods": ["gradcam"], "score": True} | settings
    given |= {} if given.get("images") else {"count": given.get("count", 2)}
    return AttributeConfig(**({"steps": 4} if "integrated_gradients" in given["methods"] else {}), **given)


def rows_of(run: Path) -> dict[tuple[str, str], dict[str, object]]:
    rows = json.loads((run / "attribution" / "scores.json").read_text())["scores"]
    return {(row["method"], row["score"]): row for row in rows}


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    """A folder of four photographs, left half the object, its border not to be counted."""
    root = tmp_path / "masked"
    random = np.random.default_rng(0)
    for place in ("train/a", "val/a", "masks/train/a", "masks/val/a"):
        (root / place).mkdir(parents=True)
    for split in ("train", "val"):
        for i in range(4):
            picture = random.integers(0, 256, (40, 48, 3), dtype=np.uint8)
            mask = np.full((40, 48), 2, dtype=np.uint8)
            mask[:, :24] = 1
            mask[:, 22:26] = 3
            Image.fromarray(picture).save(root / split / "a" / f"{i}.png")
            Image.fromarray(mask).save(root / "masks" / split / "a" / f"{i}.png")
    return root


def test_the_table_is_the_mean_over_images_whatever_the_batches(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_attribute(config(run, methods=["gradcam", "integrated_gradients"], score_count=8, batch_size=3))
    rows = rows_of(run)
    backbone, _ = load_backbone(run)
    data = open_masked(DATA, "val")
    chosen = balanced_subset(data, 8)
    (batch,) = eval_loader(chosen, DATA, batch_size=8)
    images = normalise(batch.images, DATA)
    inside = torch.stack([torch.from_numpy(data.mask(i)) for i in chosen.indices]) == 1
    for method, options in {"gradcam": {}, "integrated_gradients": {"steps": 4}}.items():
        maps = attribute(backbone, images, method, **options)
        expected = [average_precision_score(m.flatten(), v.flatten()) for m, v in zip(inside, maps, strict=True)]
        assert rows[method, "average_precision"]["mean"] == pytest.approx(np.mean(expected), abs=1e-4)
        whole = score(backbone, images, method, inside=inside, **options)
        for name, values in whole.items():
            row = rows[method, name]
            assert row["mean"] == pytest.approx(values.mean().item(), abs=1e-4), name
            assert row["low"] <= row["mean"] <= row["high"]
            assert row["images"] == row["scored"] == 8
    assert ("gradcam", "completeness") not in rows
    assert ("integrated_gradients", "completeness") in rows
    about = rows["gradcam", "energy"]
    assert (about["split"], about["data"], about["seed"], about["source"]) == ("val", "shapes", 0, "last")
    assert about["target"].startswith("self")
    assert "values [1]" in about["masks"]
    assert about["hardware"]
    assert "| gradcam |" in capsys.readouterr().out
    with (run / "attribution" / "scores.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows)
    assert "average_precision ↑" in (run / "attribution" / "scores.md").read_text()


def test_maps_that_are_shown_carry_their_own_scores(run: Path) -> None:
    run_attribute(config(run, score_count=4))
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    assert len(maps) == 2
    assert all(set(entry["scores"]) >= {"energy", "deletion"} for entry in maps)
    run_attribute(config(run, score=False))
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    assert all(entry["scores"] is None for entry in maps)


def test_object_and_background_share_the_energy(run: Path) -> None:
    """The setting decides what the object is: swapped masks must give the rest."""
    shares = []
    for values in ([1], [0]):
        run_attribute(config(run, scores=["energy"], score=False, objects=values))
        shares.append(rows_of(run)["gradcam", "energy"]["mean"])
    assert sum(shares) == pytest.approx(1, abs=1e-5)


def test_masks_of_files_and_pixels_that_do_not_count(run: Path, masked: Path) -> None:
    data = DataConfig("folder", str(masked))
    run_attribute(config(run, data=data, scores=["energy"], ignore=[3], methods=["integrated_gradients"]))
    without = rows_of(run)["integrated_gradients", "energy"]
    assert (without["split"], without["images"]) == ("val", 4)
    run_attribute(config(run, data=data, scores=["energy"], methods=["integrated_gradients"], split="train"))
    rows = json.loads((run / "attribution" / "scores.json").read_text())["scores"]
    assert {row["split"] for row in rows} == {"train", "val"}
    assert {row["root"] for row in rows} == {str(masked)}
    assert len({row["digest"] for row in rows}) == 2
    # The middle 40 of 48 columns are seen, 18 of 36 that count are the object: the noise lies evenly.
    assert without["mean"] == pytest.approx(0.5, abs=0.06)


def test_one_image_that_is_left_over_has_the_baselines_of_all(run: Path, masked: Path) -> None:
    """The last batch of one used to end the command; and every batch had other baselines than the maps shown."""
    methods = ["expected_gradients", "gradcam"]
    run_attribute(config(run, methods=methods, samples=2, scores=["deletion"], score_count=5, batch_size=2))
    assert rows_of(run)["expected_gradients", "deletion"]["images"] == 5
    (file, *_) = sorted((masked / "val" / "a").glob("*.png"))
    run_attribute(config(run, methods=methods, samples=2, score=False, images=[str(file)]))
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    assert ("expected_gradients", str(file)) in {(entry["method"], entry["image"]) for entry in maps}
    alone = {"run": str(run / "backbone.safetensors"), "output": str(run), "methods": methods[:1], "score": False}
    with pytest.raises(UserError, match="there is one: give two or more, or data="):
        run_attribute(AttributeConfig(**alone, images=[str(file)], workers=0))


def test_without_masks_there_are_the_other_scores(run: Path, masked: Path) -> None:
    files = [str(file) for file in sorted((masked / "val" / "a").glob("*.png"))]
    run_attribute(config(run, images=files, score_count=None))
    rows = rows_of(run)
    assert {name for _, name in rows} == {"deletion", "insertion"}
    assert rows["gradcam", "deletion"]["images"] == 4
    assert rows["gradcam", "deletion"]["data"] == "images"
    digest = rows["gradcam", "deletion"]["digest"]
    Image.new("RGB", (40, 40)).save(files[0])
    run_attribute(config(run, images=files, score_count=None))
    assert {rows_of(run)["gradcam", "deletion"]["digest"], digest} != {digest}, "the same path is another image now"
    kept = json.loads((run / "attribution" / "scores.json").read_text())["scores"]
    assert [row["method"] for row in kept if row["score"] == "deletion"] == ["gradcam", "centre"] * 2
    with pytest.raises(UserError, match="pointing needs masks"):
        run_attribute(config(run, images=files, scores=["pointing"]))


def test_all_scores_leave_the_weights_alone_and_show_the_control(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = scoring.score

    def watched(model: nn.Module, images: Tensor, *arguments: object, **options: object) -> dict[str, Tensor]:
        seen.append((len(images), fingerprint(model)))
        found = real(model, images, *arguments, **options)
        assert fingerprint(model) == seen[0][1]
        return found

    monkeypatch.setattr(scoring, "score", watched)
    run_attribute(config(run, scores=["all"], score_count=5, batch_size=2, seed=1))  # seed 0 made the weights
    assert max(count for count, _ in seen) == 2  # never more than a batch in memory
    rows = rows_of(run)
    assert {name for _, name in rows} >= {"infidelity", "sensitivity", "randomisation"}
    # A map that looks at no image: what a score says of it is what it is worth.
    assert rows["centre", "sensitivity"]["mean"] == 0
    assert rows["centre", "randomisation"]["mean"] == pytest.approx(1)
    assert rows["gradcam", "randomisation"]["mean"] < 0.99


def test_other_targets_add_and_the_same_one_replaces(run: Path) -> None:
    for target in ("self", "probe", "self"):
        run_attribute(config(run, target=target, scores=["deletion"], score_count=4))
    rows = json.loads((run / "attribution" / "scores.json").read_text())["scores"]
    assert sorted((row["method"], row["target"].split(":")[0]) for row in rows) == [
        ("centre", "probe"),
        ("centre", "self"),
        ("gradcam", "probe"),
        ("gradcam", "self"),
    ]
    (run / "attribution" / "scores.json").write_text("{}")
    with pytest.raises(UserError, match="is not a list of scores"):
        run_attribute(config(run, scores=["deletion"]))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["scores=[poiting]"], "did you mean 'pointing'"),
        (["--score", "split=test"], "use val, or train"),
        (["--score", "score_count=0"], "at least 1"),
    ],
)
def test_mistakes_on_the_command_line_are_named(
    run: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["attribute", f"run={run}", "workers=0", "methods=[gradcam]", *words]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (run / "attribution").exists(), "told only after maps were made"


def test_a_mask_that_does_not_fit_is_named(run: Path, masked: Path) -> None:
    Image.new("L", (3, 3)).save(masked / "masks" / "val" / "a" / "2.png")
    with pytest.raises(UserError, match=r"the mask of .*2\.png cannot be used"):
        run_attribute(config(run, data=DataConfig("folder", str(masked))))


def test_an_image_without_the_object_has_no_number(run: Path, masked: Path) -> None:
    """NaN would make the JSON unreadable for others."""
    Image.fromarray(np.full((40, 48), 2, dtype=np.uint8)).save(masked / "masks" / "val" / "a" / "2.png")
    settings = {"data": DataConfig("folder", str(masked)), "scores": ["energy", "deletion"], "count": 4}
    run_attribute(config(run, **settings))
    rows = rows_of(run)
    assert (rows["gradcam", "energy"]["images"], rows["gradcam", "deletion"]["images"]) == (3, 4)
    assert "3 of 4 images have one" in (run / "attribution" / "scores.md").read_text()
    assert "NaN" not in (run / "attribution" / "attribution.json").read_text()


@pytest.mark.parametrize("scores", [[], ["energy"]])
def test_masks_that_never_show_the_object_are_refused_with_what_they_hold(
    run: Path, masked: Path, scores: list[str]
) -> None:
    """Masks of 0 and 255 with the default objects=[1] used to lose every score against them, without a word."""
    for file in masked.glob("masks/val/a/*.png"):
        Image.fromarray(255 * (np.asarray(Image.open(file)) == 1).astype(np.uint8)).save(file)
    data = DataConfig("folder", str(masked))
    with pytest.raises(UserError, match=r"objects=\[1\], they hold \[0, 255\]: set objects"):
        run_attribute(config(run, data=data, scores=scores))
    assert not (run / "attribution").exists(), "told only after maps were made"
    run_attribute(config(run, data=data, scores=["energy"], objects=[255]))
    assert rows_of(run)["gradcam", "energy"]["images"] == 4
    run_attribute(config(run, data=data, scores=["deletion"]))
    with pytest.raises(UserError, match=r"both hold \[255\]"):
        run_attribute(config(run, data=data, scores=scores, objects=[255], ignore=[255]))


def test_a_score_that_no_method_has_is_told_as_such(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """It used to end, after a full pass, in the advice to check where the images lie."""
    with pytest.raises(UserError, match="none of gradcam has the score completeness, which path methods have"):
        run_attribute(config(run, scores=["completeness"], score_count=4))
    maps = json.loads((run / "attribution" / "attribution.json").read_text())["maps"]
    assert len(maps) == 2, "maps that are written must be listed: others may have lain there"
    with caplog.at_level(logging.WARNING):
        run_attribute(config(run, scores=["completeness", "deletion"], score_count=4))
    assert "no map has the score completeness" in caplog.text


def test_from_python_one_batch_at_a_time(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=5)
    found = score(model, images, "integrated_gradients", 2, ["completeness", "deletion"], steps=3)
    assert {name: tuple(values.shape) for name, values in found.items()} == {"deletion": (3,), "completeness": (3,)}
    inside = torch.zeros(3, 32, 32, dtype=torch.bool)
    inside[:2, 8:20, 8:20] = True
    pointed = score(model, images, "gradcam", 2, ["energy"], inside=inside)["energy"]
    assert pointed.isnan().tolist() == [False, False, True]
    with pytest.raises(UserError, match="twin="):
        score(model, images, names=["randomisation"])
    twin = small_vit(num_classes=5, global_pool="avg", class_token=False)
    with pytest.raises(UserError, match="the twin has no"):
        score(model, images, names=["randomisation"], twin=twin)


def test_a_base_beside_its_heat_flow_is_made_once_and_scores_the_same(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores that ask for further maps, of noisy images and of other weights, must not get the first map again."""
    calls: list[str] = []
    by_name = scoring.explain

    def counted(model: nn.Module, images: Tensor, method: str, *rest: object, **options: object) -> object:
        calls.append(method + (", given its source" if options.get("source") is not None else ""))
        return by_name(model, images, method, *rest, **options)

    monkeypatch.setattr(scoring, "explain", counted)
    names = {"scores": ["average_precision", "sensitivity", "randomisation", "deletion"], "score_count": 5}
    run_attribute(config(run, methods=["heat_flow:smoothgrad", "smoothgrad"], samples=3, batch_size=3, **names))
    assert calls == ["smoothgrad", "heat_flow:smoothgrad, given its source"] * 2
    beside = rows_of(run)
    assert list(dict.fromkeys(method for method, _ in beside)) == ["heat_flow:smoothgrad", "smoothgrad", "centre"]
    (run / "attribution" / "scores.json").unlink()
    run_attribute(config(run, methods=["heat_flow:smoothgrad"], samples=3, batch_size=3, **names))
    assert calls[-1] == "heat_flow:smoothgrad"
    for name in names["scores"]:
        assert beside["heat_flow:smoothgrad", name]["mean"] == rows_of(run)["heat_flow:smoothgrad", name]["mean"]
    assert beside["heat_flow:smoothgrad", "deletion"]["mean"] != beside["smoothgrad", "deletion"]["mean"]
