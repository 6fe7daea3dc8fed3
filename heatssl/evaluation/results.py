"""A number and everything that it takes to trust it."""

import json
import platform
import re
import subprocess
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from heatssl.data.loading import available_cores
from heatssl.errors import UserError
from heatssl.files import write_atomically


@dataclass(frozen=True)
class Result:
    """One entry of ``evaluation.json``."""

    metric: str  # "knn" or "10-NN", the probe's head ("linear", "4 blocks"), few labels ("5-shot", "1 % labels"), ...
    weights: str  # "pretrained" or "random_init"
    accuracy: float  # in [0, 1]; of segmentation the mean IoU, of detection an average precision
    protocol: str  # one line
    data: str
    split: str  # what the accuracy is measured on
    train_size: int
    val_size: int
    seed: int
    seconds: float  # of fitting and testing, feature extraction included when it was not cached
    backbone: str
    source: str  # "last" or "best" weights of the run whose folder this is, or RUN, timm:NAME, ...
    step: int  # optimiser steps behind the weights
    hardware: str
    commit: str | None  # of the code; ends in "+changes" when tracked files differ from it
    deviation: float | None = None  # of the accuracy over the draws of a protocol that has several
    key: str = ""  # digest of all that the accuracy depends on but code and hardware; random twins once had none
    root: str | None = None  # of the data, whole path; None where they are generated
    images: str = ""  # digest of train and val: numbers of other images cannot be compared
    selected: str = ""  # layer and pooling, where the protocol selects among several


def append_results(path: Path, results: list[Result]) -> None:
    """Add to ``evaluation.json``, see :func:`append_entries`."""
    append_entries(path, [asdict(result) for result in results])


def append_entries(path: Path, entries: list[dict[str, Any]]) -> None:
    """Add to ``evaluation.json``, whole or not at all; an entry of the same key and source is replaced, no other.

    Raises:
        UserError: when the file is there but is no list of results, or the disk is full.
    """
    replaced = {(entry["key"], entry.get("source")) for entry in entries if entry["key"]}
    kept = [entry for entry in read_results(path) if (entry.get("key"), entry.get("source")) not in replaced]
    content = json.dumps({"results": kept + entries}, indent=2)
    write_atomically(path, lambda file: file.write(content.encode()))


def read_results(path: Path) -> list[dict[str, Any]]:
    """The entries of ``evaluation.json``, oldest first; none when there is no such file.

    Raises:
        UserError: when the file is damaged.
    """
    if not path.exists():
        return []
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["results"]
        _check_entries(found)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a list of results ({error}): move it away and run the command again") from error
    return list(found)


def _check_entries(found: Any) -> None:
    """Whatever has a key was written with all fields; earlier versions left out both.

    Raises:
        ValueError: naming what is wrong.
    """
    if not isinstance(found, list):
        raise ValueError(f"its results are of type {type(found).__name__}")
    for number, entry in enumerate(found, 1):
        if not isinstance(entry, dict):
            raise ValueError(f"result {number} is of type {type(entry).__name__}")
        lacking = [each.name for each in fields(Result) if each.default is MISSING and each.name not in entry]
        if entry.get("key") and lacking:
            raise ValueError(f"result {number} has no {lacking[0]}")
        accuracy = entry.get("accuracy", 0.0)
        if isinstance(accuracy, bool) or not isinstance(accuracy, int | float):
            raise ValueError(f"the accuracy of result {number} is no number")


def format_table(results: list[Result]) -> str:
    """Aligned lines: metric, weights, accuracy in percent, protocol."""
    rows = [("metric", "weights", "accuracy", "protocol")]
    rows += [(r.metric, r.weights, _percent(r), _protocol(r)) for r in results]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{metric:<{widths[0]}}  {weights:<{widths[1]}}  {accuracy:>{widths[2]}}  {protocol}"
        for metric, weights, accuracy, protocol in rows
    )


def _protocol(result: Result) -> str:
    return f"{result.protocol}; selected: {result.selected}" if result.selected else result.protocol


def _percent(result: Result) -> str:
    deviation = "" if result.deviation is None else f" ± {100 * result.deviation:.1f}"
    return f"{100 * result.accuracy:.1f}{deviation} %"


def hardware(device: torch.device) -> str:
    """The device that did the work, for people: a GPU's name, or the processor's and the cores in use."""
    if device.type == "cuda":
        return device_name(device)
    return f"{device_name(device)}, {available_cores()} cores" + (" (MPS)" if device.type == "mps" else "")


def device_name(device: torch.device) -> str:
    """What the maker calls the GPU, or the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor that has no name there
        return platform.processor() or platform.machine()


def write_record(folder: Path, record: dict[str, Any]) -> Path:
    """A benchmark's record as ``<folder>/<hardware>.json``, by the ``hardware`` that it names."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / (re.sub(r"[^a-z0-9]+", "_", record["hardware"].lower()).strip("_") + ".json")
    path.write_text(json.dumps(record, indent=2) + "\n")
    return path


def commit() -> str | None:
    """Commit of this package's own checkout, or None when it was installed from a wheel."""
    package = Path(__file__).resolve().parents[1]
    # An environment often lies inside some other repository: that one's commit would be a lie.
    if not (package.parent / ".git").exists():
        return None
    head = _git(package.parent, "rev-parse", "HEAD")
    changes = _git(package.parent, "status", "--porcelain", "--untracked-files=no")
    return f"{head}+changes" if head and changes else head


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return answer.stdout.strip() or None
