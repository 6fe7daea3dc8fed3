"""Ctrl-C and SIGTERM end a run between two steps, where weights, optimiser and schedule agree."""

import signal
import threading
from types import FrameType
from typing import Any

import lightning as L

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Remembers the first signal; a second one interrupts at once.

    Attributes:
        signal: the signal received, or None.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}

    def listen(self) -> None:
        """Take over the handlers; only the main thread may, so that elsewhere nothing changes."""
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def restore(self) -> None:
        """Give the handlers back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def agreed(self, trainer: L.Trainer) -> bool:
        """Whether any process was asked to stop; every process must ask at the same steps."""
        if trainer.world_size == 1:
            return self.signal is not None
        return bool(trainer.strategy.reduce_boolean_decision(self.signal is not None, all=False))

    def _remember(self, number: int, _: FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number
