"""The results of ``heatssl evaluate`` as one self-contained HTML page."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.suite import NAMES, Row, summarise
from heatssl.report.numbers import percent
from heatssl.report.page import environment, write_page


@dataclass(frozen=True)
class Chart:
    """One metric on the same images: its rows, best first."""

    title: str
    rows: list[Row]
    protocols: list[str]  # one, where all rows share it


@permission_errors()
def write_results_page(folder: Path) -> Path:
    """Write ``results.html`` beside ``results.json`` and return its path.

    Raises:
        UserError: when the folder holds no results, or cannot be written to.
    """
    source, path = folder / "results.json", folder / "results.html"
    try:
        measured = json.loads(source.read_text(encoding="utf-8"))["results"]
        rows = summarise(measured)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{source} holds no results ({error}): run heatssl evaluate again") from error
    write_page(path, render(folder.resolve().name, rows))
    return path


def render(name: str, rows: list[Row]) -> str:
    """The whole page."""
    templates = environment()
    templates.filters["percent"] = percent
    return templates.get_template("results.html").render(
        name=name,
        charts=charts(rows),
        rows=[dataclasses.asdict(row) | {"metric": NAMES.get(row.metric, row.metric)} for row in rows],
    )


def charts(rows: list[Row]) -> list[Chart]:
    """One for each metric on the same images, in the order of the results."""
    keys = dict.fromkeys((row.metric, row.images_behind) for row in rows)
    several = len({place for _, place in keys}) > 1
    made = []
    for metric, place in keys:
        here = [row for row in rows if (row.metric, row.images_behind) == (metric, place)]
        title = NAMES.get(metric, metric) + (f" on {here[0].images_are}" if several else "")
        best_first = sorted(here, key=lambda row: -row.accuracy)
        made.append(Chart(title, best_first, list(dict.fromkeys(row.protocol for row in here))))
    return made
