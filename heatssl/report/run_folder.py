"""Read a run folder forgivingly: a missing or broken file becomes a remark in its section, never a crash."""

import json
import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
import yaml

from heatssl.errors import UserError

FILES = {
    "config": "config.yaml",
    "metrics": "metrics.jsonl",
    "evaluation": "evaluation.json",
    "attribution": "attribution/attribution.json",
    "pictures": "pictures.npz",
    "backbone": "backbone.json",
}
UNREADABLE = (OSError, ValueError, EOFError, yaml.YAMLError, zipfile.BadZipFile, zlib.error)
DIMENSIONS = {  # of pictures.npz
    "image": 4,
    "visible": 4,
    "reconstruction": 4,
    "from_rest": 4,
    "law_residual": 3,
    "first_view": 4,
    "second_view": 4,
    "label": 1,
    "story": 0,
}


@dataclass
class RunFolder:
    """What a run folder holds; ``problems`` says per file why it was not read: "missing", or the reason."""

    path: Path
    config: dict[str, Any] = field(default_factory=dict)
    config_text: str = ""
    metrics: list[dict[str, float]] = field(default_factory=list)  # one row per step, steps ascending
    results: list[dict[str, Any]] = field(default_factory=list)  # evaluation.json, oldest first
    maps: list[dict[str, Any]] = field(default_factory=list)  # attribution.json
    pictures: dict[str, np.ndarray] = field(default_factory=dict)
    backbone: dict[str, Any] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)


def read_run(path: Path) -> RunFolder:
    """Read whatever is there.

    Raises:
        UserError: when ``path`` is no folder, or holds none of a run's files.
    """
    if not path.is_dir():
        raise UserError(f"no such run folder: {path} (pass the output folder of heatssl pretrain)")
    if not any((path / name).exists() for name in FILES.values()):
        raise UserError(f"not a run folder: {path} holds no config.yaml (pass the output folder of heatssl pretrain)")
    run = RunFolder(path)
    readers: dict[str, Callable[[RunFolder, Path], None]] = {
        "config": _read_config,
        "metrics": _read_metrics,
        "evaluation": _read_evaluation,
        "attribution": _read_attribution,
        "pictures": _read_pictures,
        "backbone": _read_backbone,
    }
    for name, reader in readers.items():
        file = path / FILES[name]
        if not file.exists():
            run.problems[name] = "missing"
            continue
        try:
            reader(run, file)
        except UNREADABLE as error:
            run.problems[name] = f"{FILES[name]} cannot be read ({_reason(error)})"
    return run


def _read_config(run: RunFolder, file: Path) -> None:
    run.config_text = file.read_text(encoding="utf-8")
    run.config = _expect(yaml.safe_load(run.config_text), dict)


def _read_metrics(run: RunFolder, file: Path) -> None:
    """A killed run may leave half a line; a resumed one logs some steps twice, and the later line counts."""
    rows: dict[float, dict[str, float]] = {}
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(row, dict) and is_number(row.get("step")):
            numbers = {key: float(value) for key, value in row.items() if is_number(value)}
            rows.setdefault(numbers["step"], {}).update(numbers)
    run.metrics = [rows[step] for step in sorted(rows)]


def _read_evaluation(run: RunFolder, file: Path) -> None:
    results = _expect(_expect(json.loads(file.read_text(encoding="utf-8")), dict).get("results"), list)
    run.results = [result for result in results if isinstance(result, dict) and is_number(result.get("accuracy"))]


def _read_attribution(run: RunFolder, file: Path) -> None:
    maps = _expect(_expect(json.loads(file.read_text(encoding="utf-8")), dict).get("maps"), list)
    run.maps = [entry for entry in maps if isinstance(entry, dict)]


def _read_pictures(run: RunFolder, file: Path) -> None:
    if not zipfile.is_zipfile(file):  # NumPy would take it for a pickle, and advise to trust it
        raise ValueError("not a NumPy archive")
    with np.load(file, allow_pickle=False) as archive:
        pictures = {name: archive[name] for name in DIMENSIONS if name in archive}
    if "image" not in pictures:
        raise ValueError("it holds no 'image'")
    for name, array in pictures.items():
        if array.ndim != DIMENSIONS[name] or (array.ndim and len(array) != len(pictures["image"])):
            raise ValueError(f"'{name}' has shape {array.shape}")
        if array.ndim == 4 and (array.dtype != np.uint8 or array.shape[3] != 3):
            raise ValueError(f"'{name}' is not made of 8-bit RGB images")
    run.pictures = pictures


def _read_backbone(run: RunFolder, file: Path) -> None:
    run.backbone = _expect(json.loads(file.read_text(encoding="utf-8")), dict)


def is_number(value: object) -> TypeGuard[float]:
    """A finite int or float; true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def weights_of(entry: dict[str, Any]) -> str:
    """Which weights an entry of ``evaluation.json`` or ``attribution.json`` is of: ``last weights, step 100``.

    An older heatssl has left out what is missing here. Weights that no run of ours made have no step.
    """
    source, step = entry.get("source"), entry.get("step")
    of_run = source in (None, "", "last", "best")
    said = [] if source in (None, "") else [f"{source} weights" if of_run else str(source)]
    return ", ".join([*said, *([f"step {step}"] if is_number(step) and (of_run or step > 0) else [])])


def _expect(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"expected a {kind.__name__}, found {type(value).__name__}")
    return value


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:160]}"
