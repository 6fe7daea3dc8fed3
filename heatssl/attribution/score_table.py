"""Scores of methods as a table: JSON, CSV and Markdown beside the heatmaps."""

import csv
import io
import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from heatssl.attribution.score import SCORES
from heatssl.errors import UserError
from heatssl.files import write_atomically


@dataclass(frozen=True)
class Row:
    """One method by one score: a line of ``scores.csv``."""

    method: str
    score: str
    mean: float  # over the images that have one
    low: float  # of the 95 % interval: percentile bootstrap over images
    high: float
    better: str  # higher or lower
    images: int  # that have one: against masks, those that show the object
    target: str
    masks: str  # what the object is, "" where none plays a part
    data: str
    split: str
    seed: int
    source: str  # last or best weights of the run, or timm:NAME
    backbone: str
    step: int  # optimiser steps behind the weights
    seconds: float  # of all scores of this method; not of a base that has its own
    hardware: str
    commit: str | None
    protocol: str
    scored: int = 0  # images that were looked at, with a score or without; 0: an older heatssl did not say
    options: str = ""  # of the method, where they are not its own: border=0
    root: str = ""  # where the images lie; "" where they are generated, or were given one by one
    digest: str = ""  # of the images, another one when any of them is; "": an older heatssl did not say

    @property
    def title(self) -> str:
        """The method, and its options."""
        return f"{self.method}, {self.options}" if self.options else self.method


def write_scores(folder: Path, rows: list[Row]) -> None:
    """Add to ``scores.json`` in the folder, an entry of the same key is replaced; ``.csv`` and ``.md`` hold the same.

    The key is all that says what was measured: method, its options, score, target, masks, images (data, root,
    digest, split), seed, source.

    Raises:
        UserError: when the file is there but is no list of scores, or the disk is full.
    """
    replaced = {_key(row) for row in rows}
    every = [row for row in read_scores(folder / "scores.json") if _key(row) not in replaced] + rows
    table = io.StringIO()
    writer = csv.DictWriter(table, [field.name for field in fields(Row)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in every)
    texts = {
        "scores.json": json.dumps({"scores": [asdict(row) for row in every]}, indent=2),
        "scores.csv": table.getvalue(),
        "scores.md": markdown(every) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def read_scores(path: Path) -> list[Row]:
    """The entries of ``scores.json``, oldest first; none when there is no such file.

    Raises:
        UserError: when the file is damaged.
    """
    if not path.exists():
        return []
    try:
        return [Row(**entry) for entry in json.loads(path.read_text(encoding="utf-8"))["scores"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of scores ({error}): move it away and run the command again") from error


def _key(row: Row) -> tuple[object, ...]:
    return row.title, row.score, row.target, row.masks, *_images(row), row.seed, row.source


def _images(row: Row) -> tuple[str, ...]:
    """What two rows must share to be of the same images."""
    return row.data, row.root, row.digest, row.split


def markdown(rows: list[Row]) -> str:
    """A table for all that was measured alike, methods down and scores across, and what each score is.

    Measured alike: by the same weights, on as many of the same images, of the same target, against the same masks.
    Scores that need no mask stand in the tables of all masks.
    """
    groups: dict[tuple[object, ...], list[Row]] = {}
    for row in rows:
        key = (row.backbone, row.source, row.step, *_images(row), row.target, row.seed, _looked_at(row))
        groups.setdefault(key, []).append(row)
    tables = [
        _one_table([row for row in group if row.masks in ("", masks)])
        for group in groups.values()
        for masks in dict.fromkeys(row.masks for row in group if row.masks) or [""]
    ]
    return "\n\n".join(tables)


def _looked_at(row: Row) -> int:
    return row.scored or row.images


def _one_table(rows: list[Row]) -> str:
    first = rows[0]
    scores = [name for name in SCORES if any(row.score == name for row in rows)]
    arrows = {"higher": "↑", "lower": "↓"}
    columns = [f"{name} {arrows[SCORES[name].better]}" for name in scores]
    where = " ".join(filter(None, [first.data, Path(first.root).name]))
    images = f"{_looked_at(first)} images" + (f" ({first.digest})" if first.digest else "")
    lines = [
        f"{first.backbone}, {first.source} weights, step {first.step}; {where}, {first.split}, {images}",
        f"target {first.target}",
        "",
        "| method | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for method in dict.fromkeys(row.title for row in rows):
        cells = {row.score: f"{row.mean:.3g} ({row.low:.3g} to {row.high:.3g})" for row in rows if row.title == method}
        lines.append(f"| {method} | " + " | ".join(cells.get(name, "-") for name in scores) + " |")
    masks = next((row.masks for row in rows if row.masks), "")
    notes = [f"mean over images (95 % interval, bootstrap over images); seed {first.seed}", *([masks] if masks else [])]
    notes += dict.fromkeys(_what(row) for row in rows)
    notes += dict.fromkeys(f"{row.hardware}, commit {row.commit or 'unknown'}" for row in rows)
    return "\n".join([*lines, "", *(f"- {note}" for note in notes)])


def _what(row: Row) -> str:
    fewer = "" if row.images == _looked_at(row) else f"; {row.images} of {_looked_at(row)} images have one"
    return f"{row.score}, {row.better} is better: {row.protocol}{fewer}"
