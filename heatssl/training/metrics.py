"""metrics.jsonl, metrics.csv and, on request, TensorBoard: written as the run goes, by the first process."""

import csv
import io
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L

from heatssl.errors import UserError
from heatssl.files import disk_errors, write_atomically
from heatssl.training.stopwatch import TimedLoader

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

Record = dict[str, int | float]


class Clock(L.Callback):
    """First of all callbacks: ends a step on the stopwatch before the others spend time of their own."""

    def __init__(self, loader: TimedLoader) -> None:
        self.loader = loader

    def on_train_batch_end(self, *_: Any) -> None:
        """A step is done."""
        self.loader.end_step()


class Metrics(L.Callback):
    """Writes what others note during a step as one line.

    Args:
        folder: the run folder.
        loader: knows data wait and training time.
        batch_size: images per step and process.
        train_size: images per epoch.
        every: steps between two lines; the last step has one as well.
        tensorboard: mirror the numbers to ``folder/tensorboard``.

    Attributes:
        latest: the newest value of each number, for the progress display.
        written: the record of this very step, or None.
    """

    def __init__(
        self,
        folder: Path,
        loader: TimedLoader,
        *,
        batch_size: int,
        train_size: int,
        every: int,
        tensorboard: bool,
    ) -> None:
        self.path = folder / "metrics.jsonl"
        self.loader = loader
        self.batch_size = batch_size
        self.train_size = train_size
        self.every = every
        self.latest: Record = {}
        self.written: Record | None = None
        self._pending: Record = {}
        self._seconds_before = 0.0
        self._started = time.monotonic()
        self._mark = (0, 0.0, 0.0)  # step, seconds trained, seconds waited at the latest line
        self._make_board = _tensorboard(folder) if tensorboard else None
        self._board: SummaryWriter | None = None

    @property
    def seconds(self) -> float:
        """Since the start of the run, all its sittings together."""
        return self._seconds_before + time.monotonic() - self._started

    def is_due(self, trainer: L.Trainer) -> bool:
        """Whether this step ends with a line of training figures."""
        return trainer.global_step % self.every == 0 or trainer.global_step == trainer.max_steps

    def note(self, values: Record) -> None:
        """Add numbers to the line of this step."""
        self._pending |= values

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Drop lines of steps that the checkpoint has not seen: they will be written again."""
        self._started = time.monotonic()
        self._mark = (trainer.global_step, 0.0, 0.0)
        if trainer.is_global_zero:
            truncate(self.path, trainer.global_step)
            self._board = self._make_board(trainer.global_step) if self._make_board else None
            self.latest = {key: value for line in read(self.path) for key, value in line.items()}
        self._write(trainer)

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Complete this step's record with the speed, and write it."""
        if self.is_due(trainer):
            step, trained, waited = self._mark
            self._mark = (trainer.global_step, self.loader.trained, self.loader.waited)
            seconds = max(self.loader.trained - trained, 1e-9)
            images = (trainer.global_step - step) * self.batch_size * trainer.world_size
            self.note(
                {
                    "train/images_per_second": images / seconds,
                    "train/data_wait": min(1.0, (self.loader.waited - waited) / seconds),
                }
            )
        self._write(trainer)

    def _write(self, trainer: L.Trainer) -> None:
        values, self._pending = self._pending, {}
        self.written = None
        if not values or not trainer.is_global_zero:
            return
        step = trainer.global_step
        epoch = step * self.batch_size * trainer.world_size / self.train_size
        self.written = {"step": step, "epoch": round(epoch, 4), "seconds": round(self.seconds, 3), **values}
        self.latest |= self.written
        with disk_errors(self.path), self.path.open("a") as file:
            file.write(json.dumps(self.written) + "\n")
        if self._board is not None:
            for key, value in values.items():
                self._board.add_scalar(key, value, step)

    def write_csv(self) -> None:
        """metrics.csv: the same table, one column per number that ever occurred."""
        records = read(self.path)
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(dict.fromkeys(key for record in records for key in record)))
        writer.writeheader()
        writer.writerows(records)
        write_atomically(self.path.with_suffix(".csv"), lambda file: file.write(text.getvalue().encode()))
        if self._board is not None:
            self._board.flush()

    def state_dict(self) -> dict[str, Any]:
        """Seconds spent so far."""
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue the clock."""
        self._seconds_before = state["seconds"]


def read(path: Path) -> list[Record]:
    """All whole lines of a metrics.jsonl; a kill can leave half a line at its end."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def truncate(path: Path, step: int) -> None:
    """Keep the lines up to ``step`` only; at step 0, where nothing was trained yet, none."""
    if path.exists():
        kept = [record for record in read(path) if step > 0 and record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in kept)
        write_atomically(path, lambda file: file.write(text.encode()))


def _tensorboard(folder: Path) -> Callable[[int], "SummaryWriter"]:
    """Fails at once when the package is missing; the writer is made when the step to go on from is known."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise UserError("trainer.tensorboard=true needs a package: pip install tensorboard") from error
    return lambda step: SummaryWriter(str(folder / "tensorboard"), purge_step=step)
