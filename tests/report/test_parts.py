"""The report's arithmetic: verdicts, charts, colours and commands, checked on their own."""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from html import unescape
from typing import Any

import numpy as np
import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from heatssl.composition import compose
from heatssl.report.charts import MOST_POINTS, Series, line_chart, running_mean, thin, tick_label, ticks
from heatssl.report.colour import colourise, lookup_table
from heatssl.report.numbers import compare, signed, verdict
from heatssl.report.reproduce import literal, pretrain_command
from heatssl.report.run_folder import weights_of

Make = Callable[..., Any]
Config = dict[str, Any]


@pytest.mark.parametrize(
    ("pretrained", "random_init", "words", "tone"),
    [
        (0.521, 0.318, "20.3 points above random weights", "good"),
        (0.315, 0.318, "no better than random weights (\u22120.3 points", "even"),
        (0.330, 0.318, "no better than random weights (+1.2 points, within the chance of 2,000", "even"),
        (0.200, 0.318, "11.8 points below random weights", "bad"),
    ],
)
def test_the_verdict_never_flatters(pretrained: float, random_init: float, words: str, tone: str, result: Make) -> None:
    found = verdict(compare([result("linear", "pretrained", pretrained), result("linear", "random_init", random_init)]))
    assert found.meaning.startswith(words)
    assert found.tone == tone


def test_only_shares_of_images_have_an_error_from_their_number(result: Make) -> None:
    """Overlaps of pixels and average precisions are no shares of images that are right."""
    for metric, known in (("knn", True), ("10-NN", True), ("kNN segmentation", False), ("detection AP50", False)):
        (found,) = compare([result(metric, "pretrained", 0.5), result(metric, "random_init", 0.2)])
        assert (found.gain_error > 0) is known


def test_results_of_different_protocols_are_never_compared(result: Make) -> None:
    results = [result("linear", "pretrained", 0.5), result("linear", "random_init", 0.2, val_size=100)]
    comparisons = compare(results)
    assert [comparison.gain for comparison in comparisons] == [None, None]
    assert verdict(comparisons).meaning == "random weights were not evaluated"


def test_a_probe_without_a_twin_is_the_headline_before_a_segmentation_with_one(result: Make) -> None:
    of_pixels = [result("kNN segmentation", "pretrained", 0.7), result("kNN segmentation", "random_init", 0.5)]
    assert verdict(compare(of_pixels)).figure.startswith("kNN segmentation 70.0")
    with_probe = verdict(compare([*of_pixels, result("linear", "pretrained", 0.6)]))
    assert with_probe.figure.startswith("Linear probe 60.0")
    assert (with_probe.meaning, with_probe.tone) == ("random weights were not evaluated", "unknown")


def test_the_newest_of_repeated_results_counts(result: Make) -> None:
    results = [
        result("knn", "pretrained", 0.1),
        result("linear", "pretrained", 0.1),
        result("linear", "random_init", 0.2),
        result("linear", "pretrained", 0.6),
    ]
    comparisons = compare(results)
    assert [comparison.metric for comparison in comparisons] == ["linear", "knn"]
    assert comparisons[0].gain == pytest.approx(40)


def test_last_and_best_weights_are_two_and_share_the_random_twin(result: Make) -> None:
    """The best step of the online kNN is often not the best on val: 52 % vanished behind 45 %."""
    results = [
        result("knn", "pretrained", 0.52, source="last", step=5000),
        result("knn", "random_init", 0.30, source="last", step=0),
        result("knn", "pretrained", 0.45, source="best", step=100),
    ]
    found = {comparison.name: comparison for comparison in compare(results)}
    assert {name: comparison.gain for name, comparison in found.items()} == {
        "kNN": pytest.approx(22),
        "kNN, best weights": pytest.approx(15),
    }
    assert [comparison.weights for comparison in found.values()] == [
        "last weights, step 5000",
        "best weights, step 100",
    ]
    headline = verdict(list(found.values()))
    assert headline.figure.startswith("kNN, best weights 45.0")


@pytest.mark.parametrize("name", ["backbone", "images"])
def test_the_random_twin_is_of_the_same_architecture_and_saw_the_same_images(result: Make, name: str) -> None:
    """Two models may write into one output folder, and one model be tested on two tars of the same size."""
    results = [result("knn", "random_init", 0.3, **{name: "a"}), result("knn", "pretrained", 0.5, **{name: "b"})]
    assert [comparison.gain for comparison in compare(results)] == [None, None]


def test_minus_signs_are_minus_signs() -> None:
    assert (signed(20.34), signed(-0.4)) == ("+20.3", "\u22120.4")


@pytest.mark.parametrize(
    ("low", "high"), [(0, 1000), (0.0, 1e-3), (-3.2, 7.1), (0.512, 0.513), (5, 5), (0, 0), (1e5, 3e6)]
)
def test_ticks_are_round_few_and_inside_the_range(low: float, high: float) -> None:
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 8
    assert len({tick_label(tick) for tick in found}) == len(found) or high - low < 0.01 * abs(high)
    if high > low:
        assert all(low - 1e-12 <= tick <= high + 1e-12 for tick in found)


def test_a_chart_places_points_where_the_axes_say() -> None:
    svg = line_chart(Series("accuracy", "%", [0, 50, 100], [0.0, 0.5, 1.0], scale=100))
    points = json.loads(unescape(re.search(r'data-points="([^"]*)"', svg)[1]))  # type: ignore[index]
    assert [point[2:] for point in points] == [["0", "0"], ["50", "50"], ["100", "100"]]
    (x0, y0, *_), (x1, y1, *_), (x2, y2, *_) = points
    assert x1 == pytest.approx((x0 + x2) / 2)
    assert y1 == pytest.approx((y0 + y2) / 2)
    assert y2 < y0  # larger is higher up
    tick = re.search(r'<text x="[\d.]+" y="([\d.]+)" text-anchor="end">100</text>', svg)
    assert float(tick[1]) == pytest.approx(y2 + 3.5, abs=0.1)  # type: ignore[index]


@pytest.mark.parametrize("values", [[3.0], [2.0, 2.0], [0.0, 0.0, 0.0]])
def test_a_chart_of_one_value_is_drawn(values: list[float]) -> None:
    svg = line_chart(Series("loss", "", list(range(len(values))), values))
    assert "nan" not in svg
    assert svg.count('class="point"') == len(values)


def test_a_long_curve_is_thinned_and_keeps_its_ends() -> None:
    steps, values = thin(range(100_000), range(100_000))
    assert len(steps) == MOST_POINTS
    assert (steps[0], values[-1]) == (0, 99_999)


def test_the_running_mean_keeps_a_straight_line_straight() -> None:
    assert running_mean([float(i) for i in range(200)]) == pytest.approx([float(i) for i in range(200)])


@pytest.mark.parametrize("name", ["inferno", "viridis"])
def test_colours_are_those_of_matplotlib_and_grow_brighter(name: str) -> None:
    table = lookup_table(name).astype(float)  # type: ignore[arg-type]
    assert np.all(np.diff(table @ [0.2126, 0.7152, 0.0722]) >= -0.5)
    matplotlib = pytest.importorskip("matplotlib")
    assert np.abs(table - 255 * matplotlib.colormaps[name](np.arange(256))[:, :3]).max() < 2.5


def test_values_outside_the_range_and_holes_have_colours() -> None:
    colours = colourise(np.array([[-1.0, 0.0, 1.0, 9.0, np.nan]]), 0.0, 1.0)
    table = lookup_table("inferno")
    assert (colours[0, [0, 1]] == table[0]).all()
    assert (colours[0, [2, 3]] == table[255]).all()
    assert (colours[0, 4] == 128).all()
    assert (colourise(np.zeros((2, 2)), 0.0, 0.0) == table[0]).all()


def test_the_command_composes_the_very_same_run() -> None:
    words = [
        "data=folder",
        "data.root=/my data/it's (new), $HOME",
        "backbone_arguments.depth=3",
        "trainer.precision=bf16",
    ]
    words += [
        "backbone_arguments.norm_layer=layernorm2d",
        "objective.against_collapse=teacher",
        "prior=laplace",
        "prior.layers=[0,blocks.1]",
        "optimizer.learning_rate=1e-5",
    ]
    config = compose("pretrain", [*words, "data.crop_scale=[0.5,1]"])
    command = shlex.split(pretrain_command(dataclasses.asdict(config), output=config.output))
    assert command[:2] == ["heatssl", "pretrain"]
    assert compose("pretrain", [word for word in command[2:] if word.strip()]) == config


VALUES = [None, True, 3, 0.35, 1e-5, "vit_tiny", "a b", "it's, (odd)", "null", "1e3", "", [0.35, 1.0], []]


@pytest.mark.parametrize("value", VALUES)
def test_hydra_reads_a_literal_back_as_it_was(value: object) -> None:
    parser = OverridesParser.create()
    read = parser.parse_override(f"key={literal(value)}").value()
    assert getattr(read, "text", read) == value  # Hydra keeps quoted strings in a wrapper


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"source": "last", "step": 0}, "last weights, step 0"),
        ({"source": "runs/vit", "step": 100}, "runs/vit, step 100"),  # outside the run's folder it was hidden
        ({"source": "timm:test_vit", "step": 0}, "timm:test_vit"),  # no run of ours has counted any
        ({"step": 3}, "step 3"),
    ],
)
def test_weights_say_their_step_wherever_they_lie(entry: dict[str, Any], words: str) -> None:
    assert weights_of(entry) == words
