"""One table for several backbones: the same numbers as the single commands, and nothing lost."""

import csv
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from heatssl.cli import main
from heatssl.config import DataConfig, EvaluateConfig, KnnConfig, ProbeConfig, SegmentConfig
from heatssl.config_file import load_config, save_config
from heatssl.errors import UserError
from heatssl.evaluation import run_knn, run_probe, run_segment, run_suite, suite
from heatssl.evaluation.results import read_results
from heatssl.evaluation.suite import markdown, summarise

DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)


def result(name: str, accuracy: float, **changes: object) -> dict[str, object]:
    return {
        "name": name,
        "metric": "linear",
        "weights": "pretrained",
        "accuracy": accuracy,
        "protocol": "logistic regression; 80 train, 100 val images; seed 0",
        "data": "shapes",
        "split": "val",
        "train_size": 80,
        "val_size": 100,
        "seed": 0,
        "seconds": 1.0,
        "backbone": "vit",
        "source": "last",
        "step": 7,
        "hardware": "a CPU",
        "commit": None,
        **changes,
    }


def test_the_numbers_are_those_of_the_single_commands(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [str(write_run(tmp_path / name, seed)) for name, seed in (("a", 1), ("b", 2))]
    folder = run_suite(EvaluateConfig(sources=runs, workers=0, seeds=[0, 1], output=str(tmp_path / "out")))
    shown = capsys.readouterr().out
    measured = json.loads((folder / "results.json").read_text())["results"]
    assert [(r["name"], r["metric"], r["seed"]) for r in measured] == [
        (run, metric, seed) for run in runs for metric, seed in (("knn", 0), ("linear", 0), ("linear", 1))
    ]
    for run in runs:
        (knn,) = run_knn(KnnConfig(run=run, workers=0, random_init=False))
        (linear,) = run_probe(ProbeConfig(run=run, workers=0, random_init=False, seed=1))
        found = {(r["metric"], r["seed"]): r["accuracy"] for r in measured if r["name"] == run}
        assert (found["knn", 0], found["linear", 1]) == (knn.accuracy, linear.accuracy)
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert [(row["metric"], row["seeds"]) for row in rows] == [("knn", "1"), ("linear", "2")] * 2
    assert (folder / "results.md").read_text().strip() in shown
    assert not (folder / "probe.safetensors").exists()


def test_what_stands_on_disk_is_not_measured_again(
    tmp_path: Path,
    write_run: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    measured: list[str] = []
    for name in ("measure_knn", "measure_probe"):
        real = getattr(suite, name)
        monkeypatch.setattr(suite, name, lambda *a, real=real, name=name, **k: measured.append(name) or real(*a, **k))
    run = write_run(tmp_path / "a", 1)
    (knn,) = run_knn(KnnConfig(run=str(run), workers=0, random_init=False, cache=False))
    run_suite(EvaluateConfig(sources=[str(run)], workers=0, output=str(tmp_path / "one")))
    assert measured == ["measure_probe"]
    assert f"kNN, seed 0: {100 * knn.accuracy:.1f} %, from {run}/evaluation.json" in capsys.readouterr().out
    first = json.loads((tmp_path / "one" / "results.json").read_text())["results"]

    again = EvaluateConfig(sources=[str(run)], workers=0, output=str(tmp_path / "one"))
    run_suite(again)
    assert measured == ["measure_probe"]
    assert json.loads((tmp_path / "one" / "results.json").read_text())["results"] == first

    for change, count in (
        ({"fresh": True}, 2),
        ({"seeds": [1]}, 2),
        ({"data": dataclasses.replace(DATA, val_size=30)}, 2),
    ):
        measured.clear()
        run_suite(dataclasses.replace(again, output=str(tmp_path / "other"), **change))  # type: ignore[arg-type]
        assert len(measured) == count, change
    measured.clear()
    write_run(tmp_path / "a", 2)
    run_suite(again)
    assert len(measured) == 2, "other weights"


def test_segmentation_is_measured_where_there_are_masks(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suite, "SUITES", {"full": ("knn", "segmentation")})
    run = str(write_run(tmp_path / "a"))
    data = dataclasses.replace(DATA, train_size=20, val_size=10)
    folder = run_suite(EvaluateConfig(sources=[run], suite="full", data=data, workers=0, output=str(tmp_path / "out")))
    (single,) = run_segment(SegmentConfig(run=run, data=data, workers=0, random_init=False))
    knn, segmentation = json.loads((folder / "results.json").read_text())["results"]
    assert (segmentation["metric"], segmentation["accuracy"]) == ("segmentation", single.accuracy)
    assert segmentation["key"] == single.key != knn["key"]
    table = (folder / "results.md").read_text()
    assert "| backbone | kNN | segmentation, mean IoU |" in table
    assert f"| {100 * single.accuracy:.1f} |" in table, "a mean IoU has no binomial error"
    images = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("a", "b"):
            (images / split / name).mkdir(parents=True)
            for i in range(15):
                Image.new("RGB", (32, 32), (99 * (name == "a"), 9 * i, 0)).save(images / split / name / f"{i}.png")
    plain = DataConfig(name="folder", root=str(images), image_size=32)
    folder = run_suite(EvaluateConfig(sources=[run], suite="full", data=plain, workers=0, output=str(tmp_path / "no")))
    assert [entry["metric"] for entry in json.loads((folder / "results.json").read_text())["results"]] == ["knn"]


def test_rows_are_means_over_seeds_alone() -> None:
    other_protocol = "SGD; 80 train, 100 val images; seed 0"
    measured = [
        result("a", 0.5),
        result("b", 0.2),
        result("a", 0.7, seed=1, protocol="logistic regression; 80 train, 100 val images; seed 1"),
        result("a", 0.9, protocol=other_protocol),
    ]
    first, second, third = summarise(measured)
    assert (first.name, first.accuracy, first.lowest, first.highest, first.seeds) == (
        "a",
        pytest.approx(0.6),
        0.5,
        0.7,
        2,
    )
    assert first.standard_error == pytest.approx((0.6 * 0.4 / 100) ** 0.5)
    assert (second.name, third.protocol) == ("b", "SGD; 80 train, 100 val images")
    table = markdown([first, second])
    assert "| a | 60.0 ± 4.9 (50.0 to 70.0) |" in table
    assert "| b | 20.0 ± 4.0 |" in table
    (few,) = summarise([result("a", 0.6, metric="5-shot", deviation=0.02)])
    assert "| a | 60.0 ± 4.9, draws ± 2.0 |" in markdown([few])
    assert table.count("- linear: logistic regression; 80 train, 100 val images") == 1


def test_data_sets_get_tables_of_their_own() -> None:
    table = markdown(summarise([result("a", 0.5), result("b", 0.6, data="folder", metric="knn")]))
    assert table.index("shapes, val, 100 images") < table.index("folder, val, 100 images")
    assert "| backbone | kNN |" in table


def write_images(root: Path, colour: int, classes: tuple[str, ...] = ("a", "b"), masks: bool = False) -> DataConfig:
    """Fifteen images of each class in train and in val."""
    for split in ("train", "val"):
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(15):
                Image.new("RGB", (32, 32), (99 * label, 9 * i, colour)).save(root / split / name / f"{i}.png")
                if masks:
                    (root / "masks" / split / name).mkdir(parents=True, exist_ok=True)
                    mask = Image.new("L", (32, 32))
                    mask.paste(1, (0, 0, 16, 32))
                    mask.save(root / "masks" / split / name / f"{i}.png")
    return DataConfig(name="folder", root=str(root), image_size=32, workers=0)


def test_runs_on_different_images_stand_in_different_tables(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each run is measured on its own images; ``91 % of digits`` is not better than ``57 % of ImageNet``."""
    monkeypatch.setattr(suite, "SUITES", {"quick": ("knn",)})
    runs = []
    for name, colour in (("x", 0), ("y", 90)):
        run = write_run(tmp_path / name)
        config = dataclasses.replace(
            load_config(run / "config.yaml"), data=write_images(tmp_path / "of" / name, colour)
        )
        save_config(config, run / "config.yaml")
        runs.append(str(run))
    words = [*runs, "workers=0", f"output={tmp_path / 'out'}"]
    assert main(["evaluate", *words]) == 0
    table = (tmp_path / "out" / "results.md").read_text()
    assert table.count("| backbone | kNN |") == 2
    for name in ("x", "y"):
        assert f"folder {tmp_path / 'of' / name}, val, 30 images" in table
    page = (tmp_path / "out" / "results.html").read_text()
    assert page.count("<h3>kNN on folder") == 2


def test_the_same_images_share_a_table_at_any_size(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    run = write_run(tmp_path / "run")
    words = [str(run), "timm:test_resnet?random", "data=shapes", "data.train_size=80", "data.val_size=40"]
    assert main(["evaluate", *words, f"output={tmp_path / 'out'}", "workers=0"]) == 0
    rows = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert {"at 32 px" in row["backbone"] for row in rows} == {True, False}
    assert (tmp_path / "out" / "results.md").read_text().count("| backbone |") == 1


def test_a_row_names_the_code_and_the_machines_of_all_its_seeds() -> None:
    seeds = [result("a", 0.5, seed=seed, commit=commit) for seed, commit in enumerate(("abc", "def", "abc", None))]
    seeds.append(result("a", 0.5, seed=4, hardware="a GPU"))
    (row,) = summarise([r | {"protocol": f"logistic regression; seed {r['seed']}"} for r in seeds])
    assert (row.commit, row.hardware) == ("abc, def, unknown", "a CPU; a GPU")
    assert "- a CPU; a GPU, commit abc, def, unknown" in markdown([row])


def test_an_earlier_table_costs_nothing_again(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[str] = []
    real = suite.measure_knn
    monkeypatch.setattr(suite, "SUITES", {"quick": ("knn",)})
    monkeypatch.setattr(suite, "measure_knn", lambda source, _: measured.append(source.name) or real(source, _))
    a, b, c = (str(write_run(tmp_path / name, seed)) for seed, name in enumerate("abc"))
    config = EvaluateConfig(sources=[a], workers=0, output=str(tmp_path / "out"))
    folder = run_suite(config)
    (folder / "evaluation.json").unlink()  # as versions left it that wrote the table alone
    for sources in ([b], [c], [a, b, c]):
        run_suite(dataclasses.replace(config, sources=sources))
    assert measured == [a, b, c]
    assert [r["name"] for r in json.loads((folder / "results.json").read_text())["results"]] == [a, b, c]


def test_what_was_measured_is_on_disk_whatever_comes_next(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise failure

    run, folder = str(write_run(tmp_path / "a")), tmp_path / "out"
    words = ["evaluate", run, "workers=0", f"output={folder}"]
    real = suite.measure_probe
    monkeypatch.setattr(suite, "measure_probe", stop)
    failure: BaseException = KeyboardInterrupt()
    assert main(words) == 130
    assert "takes over what was measured" in capsys.readouterr().err
    assert [entry["metric"] for entry in read_results(folder / "evaluation.json")] == ["knn"]

    failure = UserError("no solver today")
    assert main(words) == 0
    assert "linear is left out: no solver today" in capsys.readouterr().out
    assert [row["metric"] for row in csv.DictReader((folder / "results.csv").open())] == ["knn"]

    monkeypatch.setattr(suite, "SUITES", {"quick": ("linear",)})
    assert main(words) == 2
    assert "no solver today" in capsys.readouterr().err

    monkeypatch.setattr(suite, "measure_probe", real)
    assert main(words) == 0
    assert [entry["metric"] for entry in read_results(folder / "evaluation.json")] == ["knn", "linear"]


def test_masks_without_classes_and_values_that_count_nowhere(
    tmp_path: Path, write_run: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "SUITES", {"quick": ("knn",), "full": ("knn", "segmentation")})
    data = write_images(tmp_path / "images", 0, classes=("all",), masks=True)
    images = ["data=folder", f"data.root={data.root}"]
    words = ["evaluate", str(write_run(tmp_path / "a")), *images, "workers=0", f"output={tmp_path / 'out'}"]
    assert main([*words, "suite=full"]) == 0
    assert "kNN is left out: all 15 images of train are of class 'all'" in capsys.readouterr().out
    assert [entry["metric"] for entry in read_results(tmp_path / "out" / "evaluation.json")] == ["segmentation"]
    assert main([*words, "suite=full", "ignore=[1]"]) == 2
    assert "mean IoU is left out: masks of train hold [0] and nothing else" in capsys.readouterr().out
    assert main([*words, "ignore=[1]"]) == 2
    assert "ignore=[1] has no effect with suite=quick, which has no segmentation" in capsys.readouterr().err


def test_a_mistake_in_the_last_source_costs_nothing(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path / "a"))
    words = ["evaluate", run, str(tmp_path / "nowhere"), f"output={tmp_path / 'out'}", "workers=0"]
    assert main(words) == 2
    assert "nowhere does not exist" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "evaluate what"),
        ({"sources": ["a"], "suite": "fast"}, "choose one of quick, full"),
        ({"sources": ["a"], "seeds": []}, "seeds is empty"),
        ({"sources": ["timm:resnet10t?random"]}, "has no images of its own"),
    ],
)
def test_what_cannot_be_measured_is_named(settings: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_suite(EvaluateConfig(**settings))  # type: ignore[arg-type]


def test_command_line_with_a_page(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    run = str(write_run(tmp_path / "<run>"))
    words = [run, "timm:test_resnet?random", "data=shapes", "data.train_size=80", "data.val_size=40"]
    assert main(["evaluate", *words, "--output", str(tmp_path / "out"), "--workers", "0"]) == 0
    assert f"-> {tmp_path / 'out' / 'results.html'}" in capsys.readouterr().out
    page = (tmp_path / "out" / "results.html").read_text()
    assert "&lt;run&gt;" in page
    assert "<run>" not in page
    assert page.count('class="bar"') == 4
    assert "shapes" in page


def test_more_shots_than_images_are_left_out_and_the_others_measured(
    tmp_path: Path, write_run: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    config = EvaluateConfig(
        sources=[str(write_run(tmp_path / "a"))],
        suite="full",
        data=dataclasses.replace(DATA, train_size=70),  # seven of each class
        workers=0,
        output=str(tmp_path / "out"),
    )
    folder = run_suite(config)
    metrics = [r["metric"] for r in json.loads((folder / "results.json").read_text())["results"]]
    assert "10-shot" not in metrics
    assert {"5-shot", "10 % labels", "block"} <= set(metrics)
    assert "10-shot is left out: a class has only 7 images" in capsys.readouterr().out


def test_taken_over_numbers_keep_the_name_of_their_run(tmp_path: Path, write_run: Callable[..., Path]) -> None:
    """In the folder of one run, "last" is its own: another run's number under that name would become its own."""
    runs = [write_run(tmp_path / name, seed) for name, seed in (("a", 1), ("b", 2))]
    for run in runs:
        run_knn(KnnConfig(run=str(run), workers=0, random_init=False))
    own = read_results(runs[0] / "evaluation.json")
    for _ in range(2):  # the second call keeps the table of the first
        run_suite(EvaluateConfig(sources=[*map(str, runs)], workers=0, output=str(runs[0])))
    kept = [entry for entry in read_results(runs[0] / "evaluation.json") if entry["metric"] == "knn"]
    assert [entry for entry in kept if entry["source"] == "last"] == own
    assert {entry["source"] for entry in kept} <= {"last", str(runs[1])}


def test_seeds_whose_protocols_are_worded_otherwise_are_both_shown() -> None:
    """A result of an earlier version, taken over: neither number may be lost."""
    other = "an earlier wording; 80 train, 100 val images; seed 1"
    rows = summarise([result("a", 0.9, protocol=other, seed=1), result("a", 0.5), result("b", 0.4)])
    table = markdown(rows)
    assert "| a | 90.0 ± 3.0 / 50.0 ± 5.0 |" in table
    assert "| b | 40.0 ± 4.9 |" in table
    assert "- linear: an earlier wording" in table


def test_an_interrupt_leaves_a_page_of_what_was_measured(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(suite, "measure_probe", stop)
    assert main(["evaluate", str(run), "workers=0", f"output={tmp_path / 'out'}"]) == 130
    assert "kNN" in (tmp_path / "out" / "results.html").read_text()
