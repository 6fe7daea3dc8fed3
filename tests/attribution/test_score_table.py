"""Tables of scores: a number must never stand below a caption that is not its own."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from heatssl.attribution.score_table import Row, markdown, read_scores, write_scores

ABOUT = {
    "low": 0.1,
    "high": 0.9,
    "better": "higher",
    "target": "self: cosine to the image's own embedding",
    "data": "tar",
    "split": "val",
    "seed": 0,
    "source": "last",
    "backbone": "vit_tiny_patch16_224 at 64 px",
    "step": 100,
    "seconds": 1.0,
    "hardware": "2 cores",
    "commit": None,
    "protocol": "as it is",
}
ANIMAL = "object: values [1] of the masks, [] ignored"
WITHOUT_BORDER = "object: values [1] of the masks, [3] ignored"


def row(method: str, score: str, mean: float, masks: str = "", images: int = 391, **changes: object) -> Row:
    return Row(**(ABOUT | {"method": method, "score": score, "mean": mean, "masks": masks, "images": images} | changes))


def table_with(text: str, words: str) -> str:
    (found,) = [part for part in text.split("\n\nvit_") if words in part]
    return found


def test_numbers_against_other_masks_have_a_table_of_their_own() -> None:
    """The second way to count the border used to stand under the caption of the first."""
    rows = [row("gradcam", "pointing", 0.25, ANIMAL), row("gradcam", "deletion", 0.5)]
    text = markdown([*rows, row("gradcam", "pointing", 0.75, WITHOUT_BORDER)])
    assert "| gradcam | 0.25 (0.1 to 0.9) | 0.5 (0.1 to 0.9) |" in table_with(text, ANIMAL)
    assert "| gradcam | 0.75 (0.1 to 0.9) | 0.5 (0.1 to 0.9) |" in table_with(text, WITHOUT_BORDER)


def test_a_method_that_was_scored_on_fewer_images_says_so() -> None:
    rows = [row("gradcam", "deletion", 0.25, scored=391), row("rise", "deletion", 0.75, images=20, scored=20)]
    text = markdown(rows)
    assert "| rise |" in table_with(text, ", 20 images")
    assert "| rise |" not in table_with(text, ", 391 images")


def test_images_without_the_object_leave_one_table_that_tells_of_them() -> None:
    rows = [row("rise", "pointing", 0.25, ANIMAL, images=390, scored=391), row("rise", "deletion", 0.75, scored=391)]
    text = markdown(rows)
    assert "| rise | 0.25 (0.1 to 0.9) | 0.75 (0.1 to 0.9) |" in text
    assert ", 391 images\n" in text
    assert "390 of 391 images have one" in text


@pytest.mark.parametrize("name", ["scored", "options", "root", "digest"])
def test_scores_of_an_older_heatssl_are_read(tmp_path: Path, name: str) -> None:
    entry = asdict(row("gradcam", "deletion", 0.25))
    del entry[name]
    (tmp_path / "scores.json").write_text(json.dumps({"scores": [entry]}))
    assert [found.mean for found in read_scores(tmp_path / "scores.json")] == [0.25]
    write_scores(tmp_path, [row("rise", "deletion", 0.5)])
    assert ", 391 images\n" in (tmp_path / "scores.md").read_text()
    assert "| gradcam | 0.25" in (tmp_path / "scores.md").read_text()


@pytest.mark.parametrize("changes", [{"root": "/data/b"}, {"digest": "2"}])
def test_scores_of_other_images_of_the_same_kind_stay_apart(tmp_path: Path, changes: dict[str, str]) -> None:
    """Two tars were one line of the table: the second replaced the first."""
    about = {"root": "/data/a", "digest": "1"}
    write_scores(tmp_path, [row("gradcam", "deletion", 0.25, **about)])
    write_scores(tmp_path, [row("gradcam", "deletion", 0.75, **(about | changes))])
    write_scores(tmp_path, [row("gradcam", "deletion", 0.5, **about)])
    assert [found.mean for found in read_scores(tmp_path / "scores.json")] == [0.75, 0.5]
    text = (tmp_path / "scores.md").read_text()
    assert text.count("| method |") == 2
    assert "; tar a, val, 391 images (1)" in text
