"""If these fail, a user's own images are refused, mislabelled, or fail later without a hint."""

from collections.abc import Callable
from pathlib import Path

import pytest

from heatssl.config import DataConfig
from heatssl.data import ImageData, open_split
from heatssl.data.folder import images_below
from heatssl.errors import UserError

Write = Callable[..., Path]


def open_folder(root: Path, split: str = "train", **settings: int) -> ImageData:
    return open_split(DataConfig(name="folder", root=str(root), **settings), split)


def refusal(root: Path, split: str = "train", **settings: int) -> str:
    with pytest.raises(UserError) as caught:
        open_folder(root, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_labels_follow_the_classes_of_train(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/b/1.jpg", "train/a/2.jpg", "train/c/3.JPG", "val/c/4.png", "val/b/5.jpg")
    train, val = open_folder(tmp_path), open_folder(tmp_path, "val")
    assert train.classes == val.classes == ["a", "b", "c"]
    assert train.labels == [0, 1, 2]
    assert val.labels == [1, 2]
    assert val.name(1) == str(tmp_path / "val/c/4.png")
    assert val.load(1).size == (20, 12)


def test_nested_images_are_found_and_hidden_files_are_not(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/deep/er/1.jpg", "train/a/._1.jpg", "train/a/.cache/2.jpg", "train/.git/3.jpg")
    (tmp_path / "train/a/notes.txt").write_text("no image")
    assert [open_folder(tmp_path).name(i) for i in range(len(open_folder(tmp_path)))] == [
        str(tmp_path / "train/a/deep/er/1.jpg")
    ]


@pytest.mark.parametrize(
    ("link", "target"),
    [
        ("train/a/up", ".."),
        ("train/a/self", "."),
        ("train/a/root", "../.."),
        ("train/a/deep/back", "../../a"),
        ("train/up", ".."),
    ],
)
def test_a_link_to_a_folder_above_adds_nothing(tmp_path: Path, write_images: Write, link: str, target: str) -> None:
    """It would bring in the other classes under this one's label, or the same images forty times."""
    write_images(tmp_path, "train/a/1.jpg", "train/a/deep/2.jpg", "train/b/3.jpg")
    (tmp_path / link).symlink_to(target)
    train = open_folder(tmp_path)
    names = [str(tmp_path / "train" / name) for name in ("a/1.jpg", "a/deep/2.jpg", "b/3.jpg")]
    assert [train.name(i) for i in range(len(train))] == names


def test_links_to_folders_elsewhere_are_followed(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/1.jpg", "store/b/2.jpg", "store/more/3.jpg")
    (tmp_path / "train/b").symlink_to("../store/b")
    (tmp_path / "train/a/more").symlink_to("../../store/more")
    train = open_folder(tmp_path)
    assert [train.name(i).removeprefix(f"{tmp_path}/train/") for i in range(len(train))] == [
        "a/1.jpg",
        "a/more/3.jpg",
        "b/2.jpg",
    ]


@pytest.mark.parametrize("place", [".", "..", "../a", "deep/.."])
def test_a_folder_is_found_whatever_way_it_is_named(
    tmp_path: Path, write_images: Write, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    write_images(tmp_path, "a/1.jpg", "a/deep/2.jpg")
    monkeypatch.chdir(tmp_path / "a")
    assert images_below(Path(place)) == (["a/1.jpg", "a/deep/2.jpg"] if place == ".." else ["1.jpg", "deep/2.jpg"])


def test_train_alone_is_enough_for_pretraining_but_not_for_val(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/1.jpg")
    assert len(open_folder(tmp_path)) == 1
    assert str(tmp_path / "val") in refusal(tmp_path, "val")


def test_missing_root(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"data\.root=PATH"):
        open_split(DataConfig(name="folder"), "train")


def test_empty_folders(tmp_path: Path, write_images: Write) -> None:
    assert "is empty" in refusal(tmp_path)
    (tmp_path / "train").mkdir()
    assert "holds no images" in refusal(tmp_path)
    write_images(tmp_path, "train/a/1.jpg")
    (tmp_path / "train/b").mkdir()
    assert str(tmp_path / "train/b") in refusal(tmp_path)


def test_val_with_loose_files_is_refused_before_training(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/1.jpg", "val/1.jpg", "val/2.jpg")
    assert "2 loose images" in refusal(tmp_path, "train")


def test_class_in_val_that_train_lacks(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/tench/1.jpg", "val/tensh/1.jpg")
    assert "rename it to 'tench'" in refusal(tmp_path, "train")


def test_expected_classes_are_counted_in_both_splits(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/1.jpg", "train/b/1.jpg", "val/a/1.jpg")
    assert "train has 2 class folders, not 3" in refusal(tmp_path, expected_classes=3)
    assert "val has 1 class folders, not 2" in refusal(tmp_path, expected_classes=2)


def test_roots_one_level_off(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, "train/a/1.jpg", "val/a/1.jpg")
    assert f"data.root={tmp_path}" in refusal(tmp_path / "train")
    write_images(tmp_path / "flat", "a/1.jpg", "b/1.jpg")
    assert "move them into" in refusal(tmp_path / "flat")
    assert "data=tar" in refusal(tmp_path / "train/a/1.jpg")


def test_a_subset_is_balanced_repeatable_and_nested(tmp_path: Path, write_images: Write) -> None:
    write_images(tmp_path, *(f"train/{name}/{i}.jpg" for name in "abc" for i in range(8)), "train/d/0.jpg")
    subset = open_folder(tmp_path, train_size=13)
    assert [subset.labels.count(label) for label in range(4)] == [4, 4, 4, 1]
    names = [subset.name(i) for i in range(13)]
    assert names == [open_folder(tmp_path, train_size=13).name(i) for i in range(13)]
    smaller = open_folder(tmp_path, train_size=6)
    assert {smaller.name(i) for i in range(6)} < set(names)
    assert len(open_folder(tmp_path, train_size=99)) == 25
    assert "leaves no image" in refusal(tmp_path, train_size=0)


def test_unknown_data_set() -> None:
    with pytest.raises(UserError, match="data=folder"):
        open_split(DataConfig(name="foldr"), "train")
