"""``evaluation.json`` keeps every number until the very same is measured again, whoever wrote it."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from heatssl.cli import main
from heatssl.config import DataConfig, KnnConfig
from heatssl.evaluation import run_knn
from heatssl.evaluation.results import read_results


@pytest.fixture
def write_images(tmp_path: Path) -> Callable[[str], DataConfig]:
    """Six images of each of two classes in train and in val, others for another name."""

    def write(name: str) -> DataConfig:
        for split in ("train", "val"):
            for label in ("a", "b"):
                (tmp_path / name / split / label).mkdir(parents=True)
                for i in range(6):
                    pixels = np.random.default_rng((ord(name[0]), len(split), ord(label), i)).integers(
                        0, 256, (32, 32, 3)
                    )
                    Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / split / label / f"{i}.png")
        return DataConfig(name="folder", root=str(tmp_path / name), image_size=32, workers=0)

    return write


def test_a_number_replaces_none_but_its_own(
    run: Path, tmp_path: Path, write_run: Callable[..., Path], write_images: Callable[[str], DataConfig]
) -> None:
    """Recommended: ``shrinkage=0.1`` after the plain neighbours, to compare them; likewise other data and runs."""
    output = tmp_path / "out"
    other_run = write_run(tmp_path / "other", seed=4)
    first, second = write_images("first"), write_images("second")
    plain = KnnConfig(run=str(run), data=first, workers=0, k=5, output=str(output))
    configs = [
        plain,
        dataclasses.replace(plain, shrinkage=0.1),
        dataclasses.replace(plain, k=3),
        dataclasses.replace(plain, data=second),
        dataclasses.replace(plain, run=str(other_run)),
    ]
    measured = [run_knn(config) for config in configs]
    twins = [results[1] for results in measured]
    assert twins[0].key == twins[4].key, "both runs have the same architecture, hence the same random twin"
    entries = read_results(output / "evaluation.json")
    assert [entry["weights"] for entry in entries].count("pretrained") == 5
    assert [entry["weights"] for entry in entries].count("random_init") == 5
    assert {entry["source"] for entry in entries} == {str(run), str(other_run)}
    roots = {(entry["root"], entry["images"]) for entry in entries}
    assert len(roots) == 2
    assert {root for root, _ in roots} == {first.root, second.root}
    run_knn(plain)
    assert len(read_results(output / "evaluation.json")) == len(entries)


def test_entries_of_earlier_versions_stay_and_can_be_read(run: Path) -> None:
    old = {"metric": "knn", "weights": "random_init", "accuracy": 0.1, "data": "shapes", "split": "val", "seed": 0}
    (run / "evaluation.json").write_text(json.dumps({"results": [old, old | {"key": ""}]}))
    run_knn(KnnConfig(run=str(run), workers=0))
    entries = read_results(run / "evaluation.json")
    assert entries[:2] == [old, old | {"key": ""}]
    assert [entry["source"] for entry in entries[2:]] == ["last", "last"]


def test_what_cannot_be_written_is_found_out_first(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "heatssl.evaluation.split_features.extract_features", lambda *_, **__: pytest.fail("extracted first")
    )
    (tmp_path / "file").touch()
    for output in ("file", "file/below"):
        assert main(["knn", f"run={run}", "workers=0", f"output={tmp_path / output}"]) == 2
        assert f"{tmp_path / 'file'} is a file: choose another output=FOLDER" in capsys.readouterr().err
    (run / "evaluation.json").write_text("{")
    assert main(["knn", f"run={run}", "workers=0"]) == 2
    assert "move it away" in capsys.readouterr().err
    assert (run / "evaluation.json").read_text() == "{"


def test_a_number_that_cannot_be_kept_is_shown(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have taken hours."""

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("heatssl.evaluation.results.write_atomically", full)
    assert main(["knn", f"run={run}", "workers=0", "random_init=false"]) == 2
    shown = capsys.readouterr()
    assert "20 nearest neighbours by cosine" in shown.out
    assert "no space left on device" in shown.err


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"results": [1]}', "result 1 is of type int"),
        ('{"results": {"a": 1}}', "its results are of type dict"),
        ('{"results": null}', "its results are of type NoneType"),
        ('{"results": [{}, {"key": "x"}]}', "result 2 has no metric"),
        ('{"results": [{"accuracy": "high"}]}', "the accuracy of result 1 is no number"),
        ("[]", "list indices"),
    ],
)
@pytest.mark.parametrize("file", ["evaluation.json", "results.json"])
def test_a_file_of_something_else_is_found_out_first(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, file: str, text: str, reason: str
) -> None:
    monkeypatch.setattr(
        "heatssl.evaluation.split_features.extract_features", lambda *_, **__: pytest.fail("extracted first")
    )
    (run / file).write_text(text)
    command = [f"run={run}"] if file == "evaluation.json" else [str(run), f"output={run}"]
    assert main(["knn" if file == "evaluation.json" else "evaluate", *command, "workers=0"]) == 2
    error = capsys.readouterr().err
    assert f"{run / file} is not a list of results ({reason}" in error
    assert error.count("\n") == 1
    assert (run / file).read_text() == text
