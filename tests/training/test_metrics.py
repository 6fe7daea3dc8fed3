"""metrics.jsonl survives kills; the CSV has every column."""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from heatssl.config import PretrainConfig
from heatssl.errors import UserError
from heatssl.training import pretrain
from heatssl.training.metrics import Metrics, read, truncate
from heatssl.training.stopwatch import TimedLoader

MakeConfig = Callable[..., PretrainConfig]


def write(path: Path, records: list[dict[str, float]], tail: str = "") -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records) + tail)


def test_half_a_line_and_lines_beyond_the_checkpoint_vanish(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [{"step": 0, "a": 1.0}, {"step": 5, "a": 2.0}, {"step": 10, "a": 3.0}], tail='{"step": 15, "a"')
    truncate(path, 5)
    assert path.read_text() == '{"step": 0, "a": 1.0}\n{"step": 5, "a": 2.0}\n'
    truncate(path, 0)
    assert path.read_text() == "", "a run that starts from nothing writes its step 0 again"
    assert read(tmp_path / "absent.jsonl") == []


def test_csv_has_the_union_of_columns(tmp_path: Path) -> None:
    write(tmp_path / "metrics.jsonl", [{"step": 0, "knn": 0.5}, {"step": 5, "loss": 2.0}])
    loader = TimedLoader(list)
    Metrics(tmp_path, loader, batch_size=1, train_size=1, every=1, tensorboard=False).write_csv()
    with (tmp_path / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows == [{"step": "0", "knn": "0.5", "loss": ""}, {"step": "5", "knn": "", "loss": "2.0"}]


def test_tensorboard_is_optional(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        pretrain(make_config(tensorboard=True))


def test_tensorboard_mirrors_the_numbers(make_config: MakeConfig) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    folder = pretrain(make_config(steps=3, knn_every=0, tensorboard=True))
    mirrored = accumulator.EventAccumulator(str(folder / "tensorboard")).Reload()
    found = {event.step: event.value for event in mirrored.Scalars("train/loss")}
    written = {line["step"]: line["train/loss"] for line in read(folder / "metrics.jsonl") if "train/loss" in line}
    assert found == pytest.approx(written)
    assert 3 in found


def test_waiting_is_told_from_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("heatssl.training.stopwatch.time.monotonic", lambda: now[0])

    def slow() -> object:
        for _ in range(2):
            now[0] += 3.0
            yield None

    loader = TimedLoader(slow)  # type: ignore[arg-type]
    for _ in loader:
        now[0] += 1.0  # the step
        loader.end_step()
        now[0] += 10.0  # an evaluation between steps
    assert loader.waited == 6.0
    assert loader.trained == 8.0
