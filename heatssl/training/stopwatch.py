"""Where the time of training goes: waiting for data, or computing."""

import time
from collections.abc import Callable, Iterable, Iterator

from heatssl.data import Batch


class TimedLoader:
    """A loader that knows how long it was waited for.

    A step is counted from the request for data to the end of its computation: evaluation and checkpoints,
    which lie between steps, slow a run down but say nothing about its speed.

    Args:
        make: creates the loader when iteration begins.
    """

    def __init__(self, make: Callable[[], Iterable[Batch]]) -> None:
        self.make = make
        self.waited = 0.0  # seconds
        self.trained = 0.0  # seconds, waiting included
        self._since: float | None = None

    def __iter__(self) -> Iterator[Batch]:
        iterator = iter(self.make())
        while True:
            asked = time.monotonic()
            self._since = self._since or asked
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited += time.monotonic() - asked
            yield batch

    def end_step(self) -> None:
        """To be called when a step is done; the next one begins with the next request for data."""
        if self._since is not None:
            self.trained += time.monotonic() - self._since
            self._since = None
