"""One bar on a terminal, one plain line now and then everywhere else; the same figures in both."""

import sys
import time
from collections.abc import Mapping
from typing import Any

import lightning as L
from tqdm import tqdm

from heatssl.expected import KEYS, Band, Expected
from heatssl.training.metrics import Metrics, Record


class Progress(L.Callback):
    """Shows loss, kNN, images per second, the share of time spent waiting for data, and the time left.

    Args:
        metrics: where the figures come from.
        expected: bands of recorded runs, to show beside the figures; None: there are none for these settings.
    """

    def __init__(self, metrics: Metrics, expected: Expected | None = None) -> None:
        self.metrics = metrics
        self.expected = expected
        self.bar: tqdm | None = None
        self._started = (0.0, 0)  # time and step

    def on_train_start(self, trainer: L.Trainer, *_: Any) -> None:
        """Open the bar where a bar can be seen."""
        self._started = (time.monotonic(), trainer.global_step)
        if trainer.is_global_zero and sys.stderr.isatty():
            layout = "{percentage:3.0f}% |{bar}| {n}/{total}{postfix}"
            self.bar = tqdm(
                total=trainer.max_steps,
                initial=trainer.global_step,
                bar_format=layout,
                dynamic_ncols=True,
                mininterval=0.3,
            )

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        """Move on by one step."""
        if not trainer.is_global_zero:
            return
        step = trainer.global_step
        written = self.metrics.written
        if self.bar is not None:
            if written is not None:
                self.bar.set_postfix_str(self._figures(step, trainer.max_steps), refresh=False)
            self.bar.update()
        elif written is not None and "train/loss" in written:
            print(f"step {step}/{trainer.max_steps}  {self._figures(step, trainer.max_steps)}", flush=True)

    def on_train_end(self, *_: Any) -> None:
        """Leave the bar as it stands."""
        if self.bar is not None:
            self.bar.close()

    def on_exception(self, *_: Any) -> None:
        """An error message begins on a line of its own."""
        if self.bar is not None:
            self.bar.close()

    def _figures(self, step: int, steps: int) -> str:
        started, first = self._started
        left = (time.monotonic() - started) / max(1, step - first) * (steps - step)
        return figures(self.metrics.latest, left, self._bands())

    def _bands(self) -> dict[str, Band]:
        """What was expected of the figures that were measured at this very step."""
        written = self.metrics.written or {}
        if self.expected is None:
            return {}
        found = {key: self.expected.at(key, written["step"]) for key in KEYS if key in written}
        return {key: band for key, band in found.items() if band is not None}


def figures(latest: Record, seconds_left: float, bands: Mapping[str, Band] | None = None) -> str:
    """The newest numbers in one line, those with a band beside it; what was not measured yet is left out."""
    bands = bands or {}
    shown = {
        "train/loss": ("loss", "{:.4f}"),
        "knn/accuracy": ("kNN", "{:.1%}"),
        "health/rankme": ("RankMe", "{:.1f}"),
        "train/images_per_second": ("", "{:.0f} img/s"),
        "train/data_wait": ("data wait", "{:.0%}"),
    }
    parts = []
    for key, (name, form) in shown.items():
        if key not in latest or (key == "health/rankme" and key not in bands):
            continue
        parts.append(f"{name} {form.format(latest[key])}".strip() + beside(latest[key], bands.get(key), form))
    return "  ".join([*parts, f"ETA {duration(seconds_left)}"])


def beside(value: float, band: Band | None, form: str) -> str:
    """`` (0.28 to 0.31)``, and on which side of the band the value lies, where it lies outside."""
    if band is None:
        return ""
    low, high = band
    outside = ", LOW" if value < low else ", HIGH" if value > high else ""
    return f" ({form.format(low)} to {form.format(high)}{outside})"


def duration(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any: 4:05, 1:02:03."""
    minutes, second = divmod(round(seconds), 60)
    hours, minute = divmod(minutes, 60)
    return f"{hours}:{minute:02}:{second:02}" if hours else f"{minute}:{second:02}"
