"""Boxes belong to their images, whatever they come from; what cannot be right is named before anything is computed."""

import json
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatssl.config import DataConfig
from heatssl.data import Squares, open_boxed, open_masked
from heatssl.data.boxes import as_boxes, box_of_mask
from heatssl.data.coco import read_instances
from heatssl.errors import UserError


def document() -> dict[str, Any]:
    """Two images of 20 x 12 pixels: two boxes and a crowd in the first, none in the second."""
    return {
        "images": [
            {"id": 7, "file_name": "a/1.png", "width": 20, "height": 12},
            {"id": 3, "file_name": "2.png", "width": 20, "height": 12},
        ],
        "annotations": [
            {"id": 1, "image_id": 7, "category_id": 90, "bbox": [2, 3, 10, 6]},
            {"id": 2, "image_id": 7, "category_id": 5, "bbox": [0, 0, 20, 12], "iscrowd": 1},
            {"id": 3, "image_id": 7, "category_id": 5, "bbox": [15.5, 6, 5, 6.4]},
        ],
        "categories": [{"id": 90, "name": "dog"}, {"id": 5, "name": "cat"}],
    }


@pytest.fixture
def root(tmp_path: Path, write_images: Callable[..., Path]) -> Path:
    """A folder of annotated images."""
    base = tmp_path / "pets"
    (base / "annotations").mkdir(parents=True)
    for split in ("train", "val"):
        write_images(base, f"{split}/a/1.png", f"{split}/2.png", f"{split}/not_annotated.png")
        (base / "annotations" / f"{split}.json").write_text(json.dumps(document()))
    return base


@pytest.fixture(params=["folder", "tar"])
def config(root: Path, request: pytest.FixtureRequest) -> DataConfig:
    """The same data, stored in two ways; the tar holds it below a folder."""
    path = root
    if request.param == "tar":
        path = root.with_suffix(".tar")
        with tarfile.open(path, "w") as archive:
            archive.add(root, "inside")
    return DataConfig(name=request.param, root=str(path), image_size=8, workers=0)


def test_annotations_in_cocos_format(config: DataConfig, root: Path) -> None:
    data = open_boxed(config, "train")
    assert data.classes == ["cat", "dog"]  # by id, as COCO's own tools order them
    assert len(data.images) == 2
    first, second = data.boxes
    expected = [[0.1, 0.25, 0.6, 0.75], [0, 0, 1, 1], [0.775, 0.5, 1, 1]]  # the last reaches over by half a pixel
    assert np.allclose(first.corners, expected)
    assert first.labels.tolist() == [1, 0, 0]
    assert first.crowd.tolist() == [False, True, False]
    assert second.corners.shape == (0, 4)
    images = pickle.loads(pickle.dumps(data.images))
    assert np.array_equal(images.load(0), Image.open(root / "train" / "a" / "1.png"))
    assert images.name(0).endswith("train/a/1.png")


def test_a_file_of_another_size_than_annotated_is_refused(root: Path) -> None:
    Image.new("RGB", (12, 20)).save(root / "train" / "2.png")
    data = open_boxed(DataConfig(name="folder", root=str(root)), "train")
    with pytest.raises(ValueError, match="say 20 x 12 pixels, the file has 12 x 20"):
        data.images.load(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("images"), "lacks 'images'"),
        (lambda d: d["annotations"].clear(), "holds nothing, or no list, as 'annotations'"),
        (lambda d: d["images"][1].pop("width"), "entry 1 of 'images' lacks 'width'"),
        (lambda d: d["annotations"].insert(0, [1, 2]), "entry 0 of 'annotations' lacks 'image_id'"),
        (lambda d: d["annotations"][0].update(image_id="7"), "image_id '7': it must be a whole number"),
        (lambda d: d["annotations"][0].update(image_id=8), "annotation 1 of x has image_id 8, which images lacks"),
        (lambda d: d["annotations"][2].update(category_id=1), "category_id 1, which categories lacks"),
        (lambda d: d["images"][1].update(id=7), "holds image 7 twice"),
        (lambda d: d["images"][0].update(height=0), "image 7 needs width and height in pixels"),
        (lambda d: d["annotations"][0].update(bbox=[2, 3, 12]), "must be [left, top, width, height] in pixels"),
        (lambda d: d["annotations"][0].update(bbox=[2, 3, 12, "9"]), "must be [left, top, width, height] in pixels"),
        (lambda d: d["annotations"][0].update(bbox=[2, 3, 12, float("nan")]), "[left, top, width, height] in pixels"),
        (lambda d: d["annotations"][0].update(bbox=[12, 3, 20, 9]), "reaches outside its image of 20 x 12 pixels"),
        (lambda d: d["annotations"][0].update(bbox=[-2, 3, 5, 5]), "not corners"),
        (lambda d: d["annotations"][0].update(bbox=[9, 3, -5, 5]), "reaches outside"),
    ],
)
def test_wrong_annotations_are_named(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    wrong = document()
    change(wrong)
    with pytest.raises(UserError) as caught:
        read_instances(json.dumps(wrong).encode(), "x")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_json_is_named() -> None:
    with pytest.raises(UserError, match=r"x is no JSON \(Expecting"):
        read_instances(b'{"images": ', "x")
    with pytest.raises(UserError, match="lacks 'images'"):
        read_instances(b"[]", "x")


def test_boxes_without_area_are_left_out_as_cocos_own_files_hold_some(caplog: pytest.LogCaptureFixture) -> None:
    flat = document()
    flat["annotations"][0]["bbox"] = [2, 3, 10, 0]
    found = read_instances(json.dumps(flat).encode(), "x")
    assert len(found.boxes[0].labels) == 2
    assert "left out 1 boxes without area" in caplog.text


def test_an_image_that_is_not_there_is_named(config: DataConfig, root: Path) -> None:
    if config.name == "folder":
        (root / "val" / "a" / "1.png").unlink()
        with pytest.raises(UserError, match=r"1 of 2 images of .*val\.json are not in .*val, a/1\.png first"):
            open_boxed(config, "val")
    else:
        moved = root.with_name("moved.tar")
        with tarfile.open(moved, "w") as archive:
            archive.add(root / "annotations", "annotations")
            archive.add(root / "train" / "2.png", "train/2.png")
        with pytest.raises(
            UserError, match=r"moved\.tar:annotations/train\.json are not in moved\.tar:train, a/1\.png"
        ):
            open_boxed(DataConfig(name="tar", root=str(moved)), "train")


def test_the_box_of_a_mask_ends_behind_its_last_pixel() -> None:
    mask = np.zeros((10, 20), dtype=bool)
    mask[3:7, 5:6] = mask[6, 15] = True
    assert np.allclose(box_of_mask(mask, 4).corners, [[0.25, 0.3, 0.8, 0.7]])
    assert box_of_mask(mask, 4).labels.tolist() == [4]
    assert len(box_of_mask(mask & False).labels) == 0


def test_scenes_have_the_box_of_their_object() -> None:
    config = DataConfig(image_size=32, train_size=20)
    data, masked = open_boxed(config, "train"), open_masked(config, "train")
    for i in range(20):
        (left, top, right, bottom), mask = (data.boxes[i].corners[0] * 32).round().astype(int), masked.mask(i)
        assert mask[top:bottom, left:right].sum() == mask.sum() > 0
        assert mask[top, left:right].any() & mask[bottom - 1, left:right].any()
        assert mask[top:bottom, left].any() & mask[top:bottom, right - 1].any()
        assert data.classes[data.boxes[i].labels[0]] in data.images.name(i)


def test_masks_give_boxes_of_one_value(root: Path) -> None:
    for split in ("train", "val"):
        (root / "annotations" / f"{split}.json").unlink()
        (root / split / "not_annotated.png").unlink()
        for name, corner in (("a/1.png", 4), ("2.png", 8)):
            mask = np.full((12, 20), 2, dtype=np.uint8)
            mask[2:6, corner:16] = 1
            path = root / "masks" / split / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(path)
    config = DataConfig(name="folder", root=str(root))
    data = open_boxed(config, "val")
    assert data.classes == ["object"]
    found = {data.images.name(i)[-5:]: box.corners[0].tolist() for i, box in enumerate(data.boxes)}
    assert found["2.png"] == pytest.approx([0.4, 2 / 12, 0.8, 0.5])
    assert found["1.png"] == pytest.approx([0.2, 2 / 12, 0.8, 0.5])
    assert open_boxed(config, "val", mask_value=2).boxes[0].corners.tolist() == [[0, 0, 1, 1]]
    with pytest.raises(UserError, match="no mask of val holds the value 9: set mask_value"):
        open_boxed(config, "val", mask_value=9)


def test_without_annotations_and_masks_both_ways_are_named(root: Path) -> None:
    (root / "annotations" / "train.json").unlink()
    with pytest.raises(
        UserError, match=r"has no annotations/train\.json in COCO's format, and boxes cannot .*masks/train"
    ):
        open_boxed(DataConfig(name="folder", root=str(root)), "train")


def test_held_out_and_sizes_take_boxes_along_with_images() -> None:
    whole = open_boxed(DataConfig(image_size=16, train_size=60), "train")
    box_of = {whole.images.name(i): whole.boxes[i].corners.tolist() for i in range(60)}
    config = DataConfig(image_size=16, train_size=60, val_size=4, held_out=0.2)
    train, held = open_boxed(config, "train"), open_boxed(config, "val")
    assert (len(train.images), len(held.images)) == (48, 4)
    names = [[data.images.name(i) for i in range(len(data.images))] for data in (train, held)]
    assert not set(names[0]) & set(names[1])
    for data, named in zip((train, held), names, strict=True):
        assert [box_of[name] for name in named] == [boxes.corners.tolist() for boxes in data.boxes]


def test_a_smaller_part_of_files(config: DataConfig) -> None:
    config.train_size = 1
    data = open_boxed(config, "train")
    assert len(data.images) == len(data.boxes) == 1
    with pytest.raises(UserError, match=r"data\.train_size=0 leaves no image"):
        open_boxed(DataConfig(name=config.name, root=config.root, train_size=0), "train")


def test_squares_show_the_whole_image_and_its_mirror_image() -> None:
    """A box in shares would point elsewhere if images were cropped, or mirrored otherwise."""
    picture = np.zeros((30, 60, 3), dtype=np.uint8)
    picture[5:10, 3:15] = 255
    boxes = as_boxes([[3 / 60, 5 / 30, 15 / 60, 10 / 30]], [0])

    class One:
        classes = ["image"]  # noqa: RUF012
        labels = [0]  # noqa: RUF012

        def __len__(self) -> int:
            return 1

        def name(self, i: int) -> str:
            return "one"

        def load(self, i: int) -> Image.Image:
            return Image.fromarray(picture)

    squares = Squares(One(), 60, mirror=True)
    assert len(squares) == 2
    for i, each in enumerate((boxes, boxes.mirrored())):
        seen = box_of_mask(np.asarray(squares.load(i))[..., 0] > 127)
        assert np.allclose(seen.corners, each.corners, atol=1 / 60)
    assert boxes.mirrored().corners[0].tolist() == pytest.approx([0.75, 5 / 30, 0.95, 10 / 30])
    assert np.allclose(boxes.mirrored().mirrored().corners, boxes.corners)
