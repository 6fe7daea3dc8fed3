"""``heatssl evaluate``: several backbones by the same protocols, in one table that says what each number is."""

import csv
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from heatssl.config import EvaluateConfig, EvaluationConfig, KnnConfig, ProbeConfig, SegmentConfig
from heatssl.data import has_masks
from heatssl.errors import UserError, check_choice, permission_errors
from heatssl.evaluation.commands import measure_knn, measure_probe
from heatssl.evaluation.measure import begin
from heatssl.evaluation.processes import is_first, rank_and_world
from heatssl.evaluation.results import append_entries, read_results
from heatssl.evaluation.segment import measure_segment
from heatssl.evaluation.source import Source, short_digest
from heatssl.export import is_run, run_folder
from heatssl.files import write_atomically
from heatssl.unused import refuse_unused

SEGMENTATION = "segmentation"  # where there are masks
MEASURES: dict[
    str, tuple[type[EvaluationConfig], dict[str, Any]]
] = {  # by what results call them: a command's settings
    "knn": (KnnConfig, {}),
    "linear": (ProbeConfig, {}),
    "1-shot": (ProbeConfig, {"shots": 1}),
    "5-shot": (ProbeConfig, {"shots": 5}),
    "10-shot": (ProbeConfig, {"shots": 10}),
    "1 % labels": (ProbeConfig, {"share": 0.01}),
    "10 % labels": (ProbeConfig, {"share": 0.1}),
    "attentive": (ProbeConfig, {"head": "attentive"}),
    "block": (ProbeConfig, {"head": "block"}),
    SEGMENTATION: (SegmentConfig, {}),
}
SUITES = {"quick": ("knn", "linear"), "full": tuple(MEASURES)}
SEEDLESS = ("knn",)
TABLE = "results.json"  # of the newest call
KEPT = "evaluation.json"  # of a run, or of all calls with the same output
NAMES = {"knn": "kNN", "block": "one block", SEGMENTATION: "segmentation, mean IoU"}


@dataclass(frozen=True)
class Row:
    """One backbone by one protocol: a line of ``results.csv``."""

    name: str  # the source as it was given
    metric: str
    accuracy: float  # mean over seeds, in [0, 1]
    lowest: float
    highest: float
    standard_error: float | None  # of one accuracy, from the number of test images alone
    seeds: int
    deviation: float | None  # over the draws of few labels, mean over seeds
    data: str
    split: str
    train_size: int
    val_size: int
    backbone: str
    step: int
    seconds: float  # of all seeds
    hardware: str  # of all seeds
    commit: str  # of all seeds
    protocol: str  # without the seed
    root: str | None  # of the data
    images: str  # digest of train and val

    @property
    def images_behind(self) -> tuple[str, str | None, str, str]:
        """What rows must share to be held against each other: the very images."""
        return self.data, self.root, self.split, self.images

    @property
    def images_are(self) -> str:
        """The images that were tested, for people."""
        return f"{self.data}{f' {self.root}' if self.root else ''}, {self.split}, {self.val_size} images"


@permission_errors()
def run_suite(config: EvaluateConfig, after_table: Callable[[Path], object] | None = None) -> Path:
    """Measure every source, print the table; whatever is measured is written at once.

    ``results.json``, ``.csv`` and ``.md`` are the table of these sources, ``evaluation.json`` keeps what this and
    earlier calls have measured. All sources are opened before anything is measured: a mistake in the last costs
    nothing. What cannot be measured is left out and named.

    Args:
        config: settings.
        after_table: called with the folder whenever the table was written.

    Returns:
        The folder of the results.

    Raises:
        UserError: on no source, an unknown suite, or input of which nothing can be measured.
    """
    _check_settings(config)
    folder = Path(config.output)
    sources = [_open(name, config) for name in dict.fromkeys(config.sources)]
    known = {} if config.fresh else _known(sources, folder)
    if is_first():
        _keep_table(folder)
    measured: list[dict[str, Any]] = []
    failures: dict[tuple[str, str], UserError] = {}
    for source, metric, seed in _plan(sources, config):
        told = f"{source.name}: {NAMES.get(metric, metric)}"
        if (source.name, metric) in failures:  # by another seed
            continue
        try:
            entry, where = _measure(source, metric, seed, config, known)
        except UserError as error:
            if rank_and_world()[1] > 1:  # the others may be waiting for this process's share
                raise
            failures[source.name, metric] = error
            _say(f"{told} is left out: {error}")
            continue
        measured.append({"name": source.name} | {key: entry[key] for key in entry if key != "name"})
        if is_first():
            if where is None:
                append_entries(folder / KEPT, [entry])
            write_tables(folder, measured)
            if after_table is not None:
                after_table(folder)
        _say(f"{told}, seed {seed}: {100 * entry['accuracy']:.1f} %" + (f", from {where}" if where else ""))
    if not measured:
        raise next(iter(failures.values()))
    _say(f"\n{markdown(summarise(measured))}")
    return folder


def _check_settings(config: EvaluateConfig) -> None:
    check_choice("suite", config.suite, SUITES, UserError)
    if not config.sources:
        raise UserError("evaluate what? heatssl evaluate RUN [RUN ...], or timm:NAME data=folder data.root=PATH")
    if not config.seeds:
        raise UserError("seeds is empty: give at least one, such as seeds=[0]")
    if SEGMENTATION not in SUITES[config.suite]:
        refuse_unused(config, ["ignore"], f"suite={config.suite}, which has no segmentation")


def _plan(sources: list[Source], config: EvaluateConfig) -> Iterator[tuple[Source, str, int]]:
    """What is to be measured, in this order: source, metric, seed."""
    for source in sources:
        for metric in SUITES[config.suite]:
            if metric != SEGMENTATION or _has_masks(source):
                for seed in config.seeds[:1] if metric in SEEDLESS else dict.fromkeys(config.seeds):
                    yield source, metric, seed


def _say(text: str) -> None:
    if is_first():
        print(text, flush=True)


def _has_masks(source: Source) -> bool:
    return has_masks(source.data, "train") and has_masks(source.data, "val")


def _keep_table(folder: Path) -> None:
    """Results of a table stay when another takes its place: earlier versions kept them nowhere else."""
    kept = {entry.get("key") for entry in read_results(folder / KEPT)}
    rows = [row for row in read_results(folder / TABLE) if row.get("key") and row["key"] not in kept]
    lacking = [
        row | ({"source": row.get("name", row["source"])} if row["source"] in ("last", "best") else {}) for row in rows
    ]
    if lacking:
        append_entries(folder / KEPT, lacking)


def _open(name: str, config: EvaluateConfig) -> Source:
    settings = EvaluationConfig(
        run=name,
        data=config.data,
        image_size=config.image_size,
        seed=min(config.seeds),
        batch_size=config.batch_size,
        workers=config.workers,
        accelerator=config.accelerator,
        output=config.output,
    )
    return begin(settings, cache=config.cache, several=True)


def _known(sources: list[Source], folder: Path) -> dict[str, tuple[dict[str, Any], Path]]:
    """Results that stand on disk already, and where: in the folders of runs, and where this command writes."""
    files = [run_folder(source.name) / KEPT for source in sources if is_run(source.name)]
    found: dict[str, tuple[dict[str, Any], Path]] = {}
    for file in dict.fromkeys([*files, folder / TABLE, folder / KEPT]):
        found |= {result["key"]: (result, file) for result in read_results(file) if result.get("key")}
    return found


def _measure(
    source: Source, metric: str, seed: int, config: EvaluateConfig, known: dict[str, tuple[dict[str, Any], Path]]
) -> tuple[dict[str, Any], Path | None]:
    """One result, and the file that it stood in already.

    Raises:
        UserError: when it cannot be measured.
    """
    kind, changes = MEASURES[metric]
    settings: Any = kind(run=source.name, seed=seed, batch_size=config.batch_size, **{"random_init": False} | changes)
    if isinstance(settings, SegmentConfig):
        settings.ignore = config.ignore
    key = source.key(metric, settings)
    if key in known:
        entry, where = known[key]
        # In another folder "last" would be another run's; and earlier versions did not write where the images are.
        told = {"source": source.origin, "root": source.root, "images": short_digest(source.digests_for(settings))}
        return entry | told, where
    shots = changes.get("shots", 0)
    fewest = min(Counter(source.splits["train"].labels).values()) if shots else 0
    if fewest < shots:
        raise UserError(f"a class has only {fewest} images")
    if isinstance(settings, KnnConfig):
        (result,) = measure_knn(source, settings)
    elif isinstance(settings, SegmentConfig):
        (result,) = measure_segment(source, settings)
    else:
        (result,) = measure_probe(source, settings, keep=False)
    return asdict(result), None


def write_tables(folder: Path, measured: list[dict[str, Any]]) -> None:
    """``results.json`` holds every result of a table, ``results.csv`` and ``results.md`` one row for each protocol.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    rows = summarise(measured)
    table = io.StringIO()
    writer = csv.DictWriter(table, list(Row.__dataclass_fields__), lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    texts = {
        TABLE: json.dumps({"results": measured}, indent=2),
        "results.csv": table.getvalue(),
        "results.md": markdown(rows) + "\n",
    }
    for name, text in texts.items():
        write_atomically(folder / name, lambda file, text=text: file.write(text.encode()))  # type: ignore[misc]


def summarise(measured: Iterable[dict[str, Any]]) -> list[Row]:
    """Results that differ in their seed alone become one row, in the order in which they came."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for result in measured:
        protocol = re.sub(r"; seed \d+$", "", result["protocol"])
        places = (result["data"], result.get("root"), result["split"], result.get("images", ""))
        key = (result["name"], result["metric"], protocol, *places)
        groups.setdefault(key, []).append(result)
    return [_row(key[2], group) for key, group in groups.items()]


def _row(protocol: str, group: list[dict[str, Any]]) -> Row:
    accuracies, first = [result["accuracy"] for result in group], group[0]
    deviations = [result["deviation"] for result in group if result.get("deviation") is not None]
    accuracy = mean(accuracies)
    copied = ("name", "metric", "data", "split", "train_size", "val_size", "backbone", "step")
    return Row(
        accuracy=accuracy,
        lowest=min(accuracies),
        highest=max(accuracies),
        # An intersection over union is no share of the images that are right.
        standard_error=None
        if "egmentation" in first["metric"]
        else math.sqrt(accuracy * (1 - accuracy) / first["val_size"]),
        seeds=len(group),
        deviation=mean(deviations) if deviations else None,
        seconds=round(sum(result["seconds"] for result in group), 1),
        hardware="; ".join(dict.fromkeys(result["hardware"] for result in group)),
        commit=", ".join(dict.fromkeys(result["commit"] or "unknown" for result in group)),
        protocol=protocol,
        root=first.get("root"),
        images=first.get("images", ""),
        **{key: first[key] for key in copied},
    )


def markdown(rows: list[Row]) -> str:
    """One table for the same images, backbones down and metrics across, and what each metric is."""
    parts = []
    for place in dict.fromkeys(row.images_behind for row in rows):
        here = [row for row in rows if row.images_behind == place]
        metrics = list(dict.fromkeys(row.metric for row in here))
        lines = [
            f"{here[0].images_are}: % right, ± standard error of the images, (range over seeds)",
            "",
            "| backbone | " + " | ".join(NAMES.get(metric, metric) for metric in metrics) + " |",
            "|---" * (len(metrics) + 1) + "|",
        ]
        for name in dict.fromkeys(row.name for row in here):
            rows_of = [row for row in here if row.name == name]
            # Several where the protocol of some seeds is told otherwise, as by an earlier version.
            cells = [" / ".join(_cell(row) for row in rows_of if row.metric == metric) for metric in metrics]
            lines.append(f"| {name} | " + " | ".join(cells) + " |")
        protocols = {f"- {NAMES.get(row.metric, row.metric)}: {row.protocol}": None for row in here}
        machines = dict.fromkeys(f"- {row.hardware}, commit {row.commit}" for row in here)
        parts.append("\n".join([*lines, "", *protocols, *machines]))
    return "\n\n".join(parts)


def _cell(row: Row) -> str:
    spread = f" ({100 * row.lowest:.1f} to {100 * row.highest:.1f})" if row.seeds > 1 else ""
    draws = "" if row.deviation is None else f", draws ± {100 * row.deviation:.1f}"
    error = "" if row.standard_error is None else f" ± {100 * row.standard_error:.1f}"
    return f"{100 * row.accuracy:.1f}{error}{draws}{spread}"
