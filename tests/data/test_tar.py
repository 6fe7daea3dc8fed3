"""If these fail, a tar file is refused, misread, or mixed up between workers."""

import gzip
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from heatssl.config import DataConfig
from heatssl.data import ImageData, eval_loader, open_split
from heatssl.data.decode import decode
from heatssl.errors import UserError

Write = Callable[..., Path]
PATHS = ("train/a/1.jpg", "train/b/2.jpg", "train/b/deep/3.jpg", "val/b/4.jpg")


def pack(tmp_path: Path, write_images: Write, *paths: str, prefix: str = ".") -> Path:
    write_images(tmp_path / "tree", *paths)
    target = tmp_path / "data.tar"
    with tarfile.open(target, "w") as archive:
        archive.add(tmp_path / "tree", arcname=prefix)
    return target


def open_tar(path: Path, split: str = "train", **settings: int) -> ImageData:
    return open_split(DataConfig(name="tar", root=str(path), image_size=16, **settings), split)


def refusal(path: Path, split: str = "train", **settings: int) -> str:
    with pytest.raises(UserError) as caught:
        open_tar(path, split, **settings)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("prefix", [".", "", "imagenet", "./some/where"])
def test_the_tar_holds_what_the_folder_holds(tmp_path: Path, write_images: Write, prefix: str) -> None:
    path = pack(tmp_path, write_images, *PATHS, prefix=prefix)
    for split in ("train", "val"):
        packed = open_tar(path, split)
        loose = open_split(DataConfig(name="folder", root=str(tmp_path / "tree")), split)
        assert packed.classes == loose.classes
        assert packed.labels == loose.labels
        for i in range(len(loose)):
            assert np.array_equal(np.asarray(packed.load(i)), np.asarray(loose.load(i)))
    assert open_tar(path).name(2) == "data.tar:train/b/deep/3.jpg"


def test_macos_leftovers_and_other_trees_are_ignored(tmp_path: Path, write_images: Write) -> None:
    extra = ("train/a/._1.jpg", "__MACOSX/train/a/9.jpg", "masks/train/z/1.png", ".hidden/train/a/8.jpg")
    path = pack(tmp_path, write_images, *PATHS, *extra)
    assert len(open_tar(path)) == 3
    assert open_tar(path).classes == ["a", "b"]


def test_workers_read_the_right_bytes_at_the_same_time(tmp_path: Path, write_images: Write) -> None:
    path = pack(tmp_path, write_images, *(f"train/{i % 3}/{i}.png" for i in range(40)))
    data = open_tar(path)
    data.load(0)  # the parent's open file must not be shared with the workers
    config = DataConfig(name="tar", image_size=16)
    pixels = {}
    for workers in (0, 2):
        config.workers = workers
        batches = list(eval_loader(data, config, batch_size=4))
        assert not any(batch.bad for batch in batches)
        pixels[workers] = np.concatenate([batch.images.numpy() for batch in batches])
    assert np.array_equal(pixels[0], pixels[2])


def test_it_can_be_sent_to_a_spawned_worker(tmp_path: Path, write_images: Write) -> None:
    data = open_tar(pack(tmp_path, write_images, *PATHS))
    data.load(0)
    assert np.array_equal(np.asarray(pickle.loads(pickle.dumps(data)).load(1)), np.asarray(data.load(1)))


def test_a_repacked_file_is_read_anew(tmp_path: Path, write_images: Write) -> None:
    assert len(open_tar(pack(tmp_path, write_images, *PATHS))) == 3
    assert len(open_tar(pack(tmp_path, write_images, "train/a/5.jpg"))) == 4


def test_compressed_tar_names_the_command(tmp_path: Path, write_images: Write) -> None:
    path = pack(tmp_path, write_images, *PATHS)
    packed = tmp_path / "data.tar.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    assert f"gunzip -k {packed}" in refusal(packed)


def test_broken_and_foreign_files(tmp_path: Path, write_images: Write) -> None:
    path = pack(tmp_path, write_images, *PATHS)
    cut = tmp_path / "cut.tar"
    cut.write_bytes(path.read_bytes()[: open_tar(path, "val")._offsets[0] + 100])
    assert "copy or pack it again" in refusal(cut)
    text = tmp_path / "text.tar"
    text.write_text("not a tar file " * 100)
    assert "not a complete tar file" in refusal(text)
    assert "does not exist" in refusal(tmp_path / "nowhere.tar")
    assert "data=folder" in refusal(tmp_path)


def test_a_tar_that_was_copied_badly_is_refused_and_not_taken_for_a_shorter_one(
    tmp_path: Path, write_images: Write
) -> None:
    """tarfile itself ends at a damaged header, or at the end of the file, without a word."""
    path = pack(tmp_path, write_images, *PATHS)
    with tarfile.open(path) as archive:
        header = archive.getmembers()[-1].offset
    whole = path.read_bytes()
    damaged = whole[:header] + b"\xff" * 8 + whole[header + 8 :]
    for content in (damaged, whole[:header], whole[: header + 100]):
        path.write_bytes(content)
        assert f"cut off at byte {header:,}" in refusal(path)


def test_hard_links_are_the_files_they_link_to(tmp_path: Path, write_images: Write) -> None:
    """tar makes them of its own accord when two names of a folder are one file."""
    write_images(tmp_path / "tree", "blobs/1.jpg", "train/a/1.jpg")
    for name in ("a/2.jpg", "b/3.jpg"):
        target = tmp_path / "tree/train" / name
        target.parent.mkdir(exist_ok=True)
        target.hardlink_to(tmp_path / "tree/blobs/1.jpg")
    data = open_tar(pack(tmp_path, write_images))
    assert [data.name(i) for i in range(len(data))] == [
        f"data.tar:train/{each}" for each in ("a/1.jpg", "a/2.jpg", "b/3.jpg")
    ]
    shared = (tmp_path / "tree/blobs/1.jpg").read_bytes()
    for i in (1, 2):
        assert data.load(i).tobytes() == decode(shared).tobytes()


def test_of_a_path_that_was_added_twice_the_last_file_counts(tmp_path: Path, write_images: Write) -> None:
    path = pack(tmp_path, write_images, *PATHS)
    write_images(tmp_path / "new", "spare.jpg", "1.jpg")  # other pixels
    with tarfile.open(path, "a") as archive:
        archive.add(tmp_path / "new/1.jpg", arcname="train/a/1.jpg")
    data = open_tar(path)
    assert len(data) == 3
    assert data.load(0).tobytes() == decode((tmp_path / "new/1.jpg").read_bytes()).tobytes()


@pytest.mark.parametrize("link", ["train/a/9.jpg", "train/c"])
def test_what_cannot_be_read_in_place_is_refused_and_not_left_out(
    tmp_path: Path, write_images: Write, link: str
) -> None:
    """A folder of links would otherwise be trained on without most of its images, or without a class."""
    write_images(tmp_path / "tree", *PATHS)
    (tmp_path / "tree" / link).symlink_to("../a" if link == "train/c" else "1.jpg")
    found = refusal(pack(tmp_path, write_images))
    assert f"1 links or sparse files that cannot be read in place, {link} first" in found
    assert "tar -h" in found


def test_a_hard_link_to_a_file_that_was_not_packed_is_refused(tmp_path: Path, write_images: Write) -> None:
    path = pack(tmp_path, write_images, *PATHS)
    link = tarfile.TarInfo("train/a/9.jpg")
    link.type, link.linkname = tarfile.LNKTYPE, "elsewhere/9.jpg"
    with tarfile.open(path, "a") as archive:
        archive.addfile(link)
    assert "train/a/9.jpg first" in refusal(path)


def test_layout_errors(tmp_path: Path, write_images: Write) -> None:
    assert "no images below train/ or val/" in refusal(pack(tmp_path / "1", write_images, "a/1.jpg"))
    assert "1 loose images" in refusal(pack(tmp_path / "2", write_images, "train/a/1.jpg", "val/1.jpg"))
    assert "which train lacks" in refusal(pack(tmp_path / "3", write_images, "train/a/1.jpg", "val/b/1.jpg"))
    assert "not 7" in refusal(pack(tmp_path / "4", write_images, *PATHS), expected_classes=7)
    assert "val holds no images" in refusal(pack(tmp_path / "5", write_images, "train/a/1.jpg"), "val")
