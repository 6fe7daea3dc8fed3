"""One table for several backbones: the same numbers as the single commands, and nothing lost."""

import csv
import json
from collections.abc import Callable
from pathlib import Path

import pytest

from heatssl.cli import main
from heatssl.config import EvaluateConfig, KnnConfig, ProbeConfig
from heatssl.errors import UserError
from heatssl.evaluation import run_knn, run_probe, run_suite
from heatssl.evaluation.suite import markdown, summarise


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
