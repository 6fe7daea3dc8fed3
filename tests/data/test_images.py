"""If these fail, a folder of photographs without classes is refused, or numbers are told that mean nothing."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heatssl import cli
from heatssl.config import DataConfig
from heatssl.data import ImageData, open_split
from heatssl.data.images import val_positions
from heatssl.errors import UserError

Write = Callable[..., Path]
SMALL = ["data.image_size=32", "data.workers=0", "backbone=vit_tiny_patch16_224", "trainer.devices=1"]
SMALL += ["backbone_arguments={patch_size: 8, depth: 1, embed_dim: 48, num_heads: 3}"]
SMALL += ["trainer.steps=2", "trainer.batch_size=4", "trainer.knn_every=1", "trainer.log_every=1"]


def open_images(root: Path, split: str = "train", **settings: int) -> ImageData:
    return open_split(DataConfig(name="images", root=str(root), **settings), split)


def test_every_image_below_is_in_one_split(tmp_path: Path, write_images: Write) -> None:
    names = [f"{place}{i:02}.jpg" for place in ("", "holiday/", "holiday/2019/") for i in range(10)]
    write_images(tmp_path, *names, ".hidden/1.jpg", "holiday/._2.jpg")
    train, val = open_images(tmp_path), open_images(tmp_path, "val")
    shown = [{data.name(i) for i in range(len(data))} for data in (train, val)]
    assert shown[0] | shown[1] == {str(tmp_path / name) for name in names}
    assert not shown[0] & shown[1]
    assert (len(train), len(val)) == (22, 8)
    assert any("2019" in name for name in shown[1]), "val is not one folder"
    assert train.load(0).size == (20, 12)
    assert set(train.labels) == set(val.labels) == {0}
    assert len(open_images(tmp_path, train_size=5)) == 5
    assert len(open_images(tmp_path, "val", held_out=0.5)) == 11


@pytest.mark.parametrize(("images", "of_val"), [(2, 1), (9, 4), (100, 8), (5000, 50), (1_300_000, 1000)])
def test_a_hundredth_is_val(images: int, of_val: int) -> None:
    positions = val_positions(images)
    assert len(set(positions)) == len(positions) == of_val
    assert 0 <= min(positions) <= max(positions) < images


def test_what_is_no_folder_of_images_is_refused(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "1.jpg")
    for place, message in (("no", "is no folder"), ("1.jpg", "is no folder"), (".", "holds 1")):
        with pytest.raises(UserError, match=message):
            open_images(tmp_path / place)
    with pytest.raises(UserError, match="expected_classes=null"):
        open_images(tmp_path, expected_classes=2)


def test_from_photographs_to_heatmaps(tmp_path: Path, write_images: Write, capsys: pytest.CaptureFixture[str]) -> None:
    photographs, run = tmp_path / "photographs", tmp_path / "run"
    write_images(photographs, *(f"{i // 5}/{i}.jpg" for i in range(20)))
    pretrain = ["pretrain", "data=images", f"data.root={photographs}", *SMALL, f"output={run}"]
    assert cli.main(pretrain) == 0
    told = capsys.readouterr().out
    assert "12 images of one class (no online kNN)" in told
    assert "heat_jepa on" in told, "what photographs are pretrained with"
    assert "kNN" not in told.replace("(no online kNN)", ""), "all of one class would be 100 %"
    assert not (run / "best_backbone.safetensors").exists()
    assert cli.main(pretrain) == 0
    assert "is finished" in capsys.readouterr().out
    for command in ("knn", "probe", "finetune"):
        assert cli.main([command, f"run={run}"]) == 2
        assert "data=images has no classes to measure by" in capsys.readouterr().err
    assert cli.main(["segment", f"run={run}"]) == 2
    assert "data=images has no masks" in capsys.readouterr().err
    labelled = tmp_path / "labelled"
    write_images(
        labelled, *(f"{split}/{name}/{i}.jpg" for split in ("train", "val") for name in "ab" for i in range(3))
    )
    assert cli.main(["knn", f"run={run}", "data=folder", f"data.root={labelled}", "k=3", "workers=0"]) == 0
    assert cli.main(["attribute", f"run={run}", "methods=[gradcam]", "count=2", "workers=0"]) == 0
    assert cli.main(["report", f"run={run}"]) == 0
    assert "cannot be read" not in (run / "report.html").read_text()


def test_the_other_layouts_name_this_one(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "flat/1.jpg", "one/train/a/1.jpg", "loose/train/1.jpg")
    for place, split, message in (
        ("flat", "train", "data=images takes any folder"),
        ("loose", "train", "data=images takes any folder"),
        ("one", "val", "data.held_out=0.1 leaves val unread"),
    ):
        with pytest.raises(UserError, match=message):
            open_split(DataConfig(name="folder", root=str(tmp_path / place)), split)
