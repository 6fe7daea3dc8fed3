"""Build report.html from a run folder: read, compute, fill the template, write in one go."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from markupsafe import Markup

from heatssl.config_file import load_config
from heatssl.errors import UserError, permission_errors
from heatssl.expected import Expected, expected_of
from heatssl.report.charts import Series, line_chart, value_label
from heatssl.report.numbers import HEADS, Comparison, compare, percent, signed, verdict
from heatssl.report.page import environment, write_page
from heatssl.report.pictures import heatmap_groups, scenes, story
from heatssl.report.reproduce import follow_up_commands, pretrain_command
from heatssl.report.run_folder import RunFolder, is_number, read_run

# key of metrics.jsonl -> how its curve is drawn
MAIN_CURVES: dict[str, dict[str, Any]] = {
    "train/loss": {"title": "loss", "note": "pretraining loss, raw and running mean", "smooth": True},
    "knn/accuracy": {
        "title": "kNN accuracy",
        "unit": "%",
        "scale": 100.0,
        "note": "online, images of train by their neighbours among others of train",
    },
    "health/rankme": {
        "title": "RankMe",
        "note": "effective number of feature dimensions; near 1 means collapse",
        "from_zero": True,
    },
    "health/law_residual": {
        "title": "law residual",
        "note": "how far features are from obeying the law",
        "from_zero": True,
    },
    "health/channel_std": {
        "title": "channel spread",
        "note": "standard deviation per channel; near 0 means collapse",
        "from_zero": True,
    },
    "train/lr": {"title": "learning rate", "note": "warm-up, then cosine", "from_zero": True},
}
NOT_CURVES = {"step", "epoch", "seconds"}
GALLERY = "attribution/gallery.html"  # what heatssl attribute writes


@dataclass
class Curve:
    """One chart with its heading; ``last`` is what the heading shows until the pointer is over the chart."""

    title: str
    note: str
    last: str
    chart: Markup


@permission_errors()
def write_report(run: Path) -> Path:
    """Write ``report.html`` into a run folder, from the files found there, and return its path.

    A file that is missing or broken becomes a remark in its section.

    Raises:
        UserError: when ``run`` is not a run folder, or cannot be written to.
    """
    run = Path(run)
    page = render(read_run(run))
    path = run / "report.html"
    write_page(path, page)
    return path


def render(run: RunFolder) -> str:
    """The whole page."""
    templates = environment()
    templates.filters |= {"percent": percent, "signed": signed, "thousands": thousands}
    comparisons = compare(run.results)
    main, more = curves(run.metrics, _expected(run))
    heading, explanation, captions = story(run.pictures)
    pictures, residual_range = scenes(run.pictures, captions)
    objective = run.config.get("objective")
    return templates.get_template("template.html").render(
        name=run.path.resolve().name,
        verdict=verdict(comparisons),
        facts=facts(run),
        comparisons=comparisons,
        lacking=lacking(comparisons),
        curves=main,
        more_curves=more,
        scenes=pictures,
        scenes_heading=heading,
        scenes_explanation=explanation,
        residual_range=residual_range,
        true_statistics=isinstance(objective, dict) and objective.get("target") == "normalised",
        groups=heatmap_groups(run),
        gallery=GALLERY if (run.path / GALLERY).is_file() else "",
        problems=run.problems,
        commands=follow_up_commands(run.path),
        reproduce=reproduce(run),
        config_text=run.config_text,
    )


def _expected(run: RunFolder) -> Expected | None:
    """Bands of recorded runs, where the run's settings are theirs; a broken config has a remark of its own."""
    try:
        return expected_of(load_config(run.path / "config.yaml"))
    except UserError:
        return None


def reproduce(run: RunFolder) -> str:
    """Shell lines that make the run again, in a folder beside it, as a finished run stays as it is."""
    if not run.config:
        return ""
    again = f"runs/{run.path.resolve().name}_again"
    measured = {str(result.get("metric")) for result in run.results}
    heads = [head for head in HEADS if head in measured]
    commands = follow_up_commands(again, (run.results or [{}])[-1].get("seed"), heads)
    return "\n".join([pretrain_command(run.config, again), *commands.values()])


def lacking(comparisons: list[Comparison]) -> list[str]:
    """Commands whose numbers are not there yet."""
    present = {comparison.metric for comparison in comparisons if comparison.pretrained}
    return [command for metric, command in (("linear", "probe"), ("knn", "knn")) if metric not in present]


def curves(metrics: list[dict[str, float]], expected: Expected | None) -> tuple[list[Curve], list[Curve]]:
    """The main curves, with what was to be expected of them, and one for every other key that was logged."""
    keys = sorted({key for row in metrics for key in row} - NOT_CURVES)
    others = [key for key in keys if key not in MAIN_CURVES]
    main = [_curve(metrics, key, expected) for key in MAIN_CURVES if key in keys]
    return main, [_curve(metrics, key, None) for key in others]


def _curve(metrics: list[dict[str, float]], key: str, expected: Expected | None) -> Curve:
    measured = [(row["step"], row[key]) for row in metrics if key in row]
    settings = MAIN_CURVES.get(key, {"title": key})
    series = Series(
        steps=[step for step, _ in measured],
        values=[value for _, value in measured],
        band=expected.line(key) if expected is not None else (),
        **{"unit": "", **settings},
    )
    last = value_label(series.values[-1] * series.scale) + (f"\u00a0{series.unit}" if series.unit else "")
    note = f"{series.note}; shaded: recorded runs of this recipe" if series.band else series.note
    return Curve(series.title, note, last, line_chart(series))


def facts(run: RunFolder) -> list[tuple[str, str]]:
    """What the run was, as (name, value); what is unknown is left out."""
    config, trainer, data = run.config, _table(run.config, "trainer"), _table(run.config, "data")
    objective, prior, newest = _table(config, "objective"), _table(config, "prior"), (run.results or [{}])[-1]
    arguments = _table(config, "backbone_arguments") or _table(run.backbone, "arguments")
    image_size = data.get("image_size") or run.backbone.get("image_size")
    last = run.metrics[-1] if run.metrics else {}
    speeds = sorted(row["train/images_per_second"] for row in run.metrics if "train/images_per_second" in row)
    named = {
        "backbone": _join([config.get("backbone") or run.backbone.get("name"), *_settings(arguments)]),
        "data": _join([data.get("name"), data.get("root"), f"{image_size} px" if image_size else None]),
        "objective": _join(
            [
                objective.get("name"),
                *_settings({key: value for key, value in objective.items() if key != "name"}),
            ]
        ),
        "prior": _join([prior["name"], *_settings({key: value for key, value in prior.items() if key != "name"})])
        if prior.get("name", "none") != "none"
        else None,
        "steps": _steps(last.get("step"), trainer.get("steps")),
        "batch": trainer.get("batch_size"),
        "seed": config.get("seed"),
        "training time": duration(last["seconds"]) if "seconds" in last else None,
        "speed": f"{thousands(round(speeds[len(speeds) // 2]))} images/s (median)" if speeds else None,
        "hardware": newest.get("hardware"),
        "commit": short_commit(newest.get("commit")),
    }
    return [(name, str(value)) for name, value in named.items() if value not in (None, "")]


def _steps(done: float | None, planned: object) -> str | None:
    if not is_number(planned):
        return thousands(done) if done is not None else None
    if done is not None and done + 1 < planned:
        return f"{thousands(done)} of {thousands(planned)} logged"
    return thousands(planned)


def _table(config: dict[str, Any], name: str) -> dict[str, Any]:
    value = config.get(name)
    return value if isinstance(value, dict) else {}


def _join(parts: list[Any]) -> str:
    return " · ".join(str(part) for part in parts if part not in (None, ""))


def _settings(table: dict[str, Any]) -> list[str]:
    """``{"depth": 6, "flip": True, "channels": None}`` -> depth 6, flip true."""
    words = {key: str(value).lower() if isinstance(value, bool) else value for key, value in table.items()}
    return [f"{key} {word}" for key, word in words.items() if word is not None]


def short_commit(commit: object) -> str:
    """The first ten digits of a hash, with whatever follows the hash: ``+changes``."""
    found, plus, rest = str(commit or "").partition("+")
    return found[:10] + plus + rest


def duration(seconds: float) -> str:
    """93 -> 1 min 33 s."""
    whole = round(seconds)
    hours, minutes, rest = whole // 3600, whole % 3600 // 60, whole % 60
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def thousands(value: Any) -> str:
    """12345 -> 12,345; what is no number stays as it is."""
    return f"{round(value):,}" if is_number(value) else str(value)
