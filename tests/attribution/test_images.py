"""A user's own pictures through the real command: whatever a camera, a scanner or the web has made of them."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatssl.cli import main

PIXELS = np.random.default_rng(0).integers(0, 256, (30, 44, 3), dtype=np.uint8)


def write_pictures(folder: Path) -> list[Path]:
    """One of each kind that breaks programs."""
    folder.mkdir()
    picture = Image.fromarray(PIXELS)
    turned = Image.Exif()
    turned[0x0112] = 6
    frames = {"save_all": True, "append_images": [Image.new("RGB", picture.size)], "duration": 20}
    sixteen = Image.fromarray(np.linspace(0, 65535, 900, dtype=np.uint16).reshape(30, 30))
    kinds = {
        "grey.png": (picture.convert("L"), {}),
        "cmyk.jpg": (picture.convert("CMYK"), {}),
        "sixteen.png": (sixteen, {}),
        "turned.jpg": (picture, {"exif": turned}),
        "moving.gif": (picture, frames),
        "moving.webp": (picture, frames),
        "slim.png": (picture.crop((0, 0, 1, 30)), {}),
        "dot.png": (picture.crop((0, 0, 1, 1)), {}),
        "it's, [odd].png": (picture.convert("RGBA"), {}),
    }
    for name, (image, options) in kinds.items():
        image.save(folder / name, **options)
    return sorted(folder / name for name in kinds)


def attribute(run: Path, *words: str) -> int:
    return main(["attribute", f"run={run}", "methods=[gradcam]", "size=32", *words])


def entries(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "attribution" / "attribution.json").read_text())["maps"]
    return found


def listed(folder: Path) -> list[str]:
    return [entry["image"] for entry in entries(folder)]


def test_files_and_folders_of_every_kind(run: Path, tmp_path: Path) -> None:
    files = write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "notes.txt").write_text("not an image")
    first, *_, last = map(str, files)
    assert attribute(run, last, str(tmp_path / "pictures")) == 0
    assert listed(run) == [last, *(str(file) for file in files[:-1])]
    assert first in listed(run)


def test_a_damaged_one_among_many_is_skipped_and_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = write_pictures(tmp_path / "pictures")
    damaged = tmp_path / "pictures" / "cmyk.jpg"
    damaged.write_bytes(damaged.read_bytes()[:200])
    empty = tmp_path / "pictures" / "empty.gif"
    empty.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert attribute(run, str(tmp_path / "pictures")) == 0
    assert set(listed(run)) == {str(file) for file in files if file != damaged}
    told = [record.getMessage() for record in caplog.records if record.name.startswith("heatssl")]
    assert sorted(line.split(" cannot be read")[0] for line in told) == [
        f"skipped image {damaged}",
        f"skipped image {empty}",
    ]


def test_a_damaged_one_of_a_split_is_skipped_and_named(
    run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Seven maps where eight were asked for would else be a riddle."""
    for split in ("train", "val"):
        (tmp_path / "data" / split).mkdir(parents=True)
        write_pictures(tmp_path / "data" / split / "a")
    (tmp_path / "data" / "val" / "a" / "cmyk.jpg").write_bytes(b"half a file")
    with caplog.at_level(logging.WARNING):
        assert attribute(run, "data=folder", f"data.root={tmp_path / 'data'}", "workers=0") == 0
    told = [record.getMessage() for record in caplog.records if record.name.startswith("heatssl")]
    assert len(told) == 1
    assert "skipped" in told[0]
    assert "cmyk.jpg" in told[0]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: (folder / "a.png").write_bytes(b"\x89PNG"), "a.png cannot be read"),
        (lambda folder: None, "holds no images"),
        (lambda folder: folder.rmdir(), "does not exist"),
    ],
)
def test_nothing_to_read_is_one_line(
    run: Path, tmp_path: Path, make, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    make(folder)
    assert attribute(run, str(folder)) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("heatssl: error:")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not (run / "attribution").exists()


def test_weights_of_timm_need_neither_data_nor_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("cat.jpg")
    words = ["cat.jpg", "--model", "timm:test_vit?random", "--methods", "[gradcam]", "--score", "size=32"]
    assert main(["attribute", *words]) == 0
    assert listed(tmp_path / "runs" / "test_vit") == ["cat.jpg"]
    assert (tmp_path / "runs" / "test_vit" / "attribution" / "scores.md").exists()


def test_neighbours_of_weights_without_data_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Generated scenes would otherwise stand in silently for images that nobody named."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(PIXELS).save("cat.jpg")
    assert main(["attribute", "cat.jpg", "--model", "timm:test_vit?random", "target=neighbours"]) == 2
    assert "needs images of train" in capsys.readouterr().err


def test_maps_of_other_images_stay(run: Path, tmp_path: Path) -> None:
    """A look at a photograph must not write over what a run's own images have."""
    files = write_pictures(tmp_path / "pictures")
    assert attribute(run, "count=2") == 0
    own = listed(run)
    maps = {entry["file"]: (run / entry["file"]).read_bytes() for entry in entries(run)}
    assert attribute(run, *map(str, files[:2])) == 0
    assert listed(run) == [*own, *map(str, files[:2])]
    assert maps == {name: (run / name).read_bytes() for name in maps}
    assert attribute(run, str(files[1])) == 0, "again, on its own"
    assert listed(run) == [*own, *map(str, files[:2])]
    assert all((run / entry["file"]).with_suffix(".npy").exists() for entry in entries(run))


def test_a_file_whose_name_looks_like_a_setting(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "a=b.png")
    monkeypatch.chdir(tmp_path)
    assert attribute(run, "a=b.png") == 0
    assert listed(run) == ["a=b.png"]
