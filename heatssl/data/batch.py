"""A batch, and what became of the files that could not be read."""

import logging
from typing import Any, NamedTuple

from torch import Tensor

from heatssl.errors import UserError

log = logging.getLogger(__name__)


class Batch(NamedTuple):
    """Images of one step. Unreadable files are left out, so B may be smaller than asked for, even 0.

    Attributes:
        images: uint8 (B K, 3, S, S), RGB, K crops of each image: crop k of image i is row i K + k. K is 1 where
            nothing else was asked for.
        labels: long (B,).
        indices: long (B,), positions in the data set.
        bad: the files left out, as ``name: reason``.
    """

    images: Tensor
    labels: Tensor
    indices: Tensor
    bad: list[str]


class BadFiles:
    """Tells of every unreadable file once, and stops when they are too many.

    Args:
        limit: the share of unreadable files over which ``check`` raises.

    Attributes:
        names: the unreadable files met so far, as ``name: reason``, in the order they came.
    """

    _ENOUGH = 100  # images after which a share means something

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.names: list[str] = []
        self._known: set[str] = set()
        self._seen = 0
        self._bad = 0

    def update(self, batch: Batch) -> None:
        """Count a batch; from 100 images on, check the share.

        Raises:
            UserError: when more than the limit cannot be read.
        """
        self._seen += len(batch.indices) + len(batch.bad)
        # Over several epochs the same file comes again: counting each time keeps the share comparable.
        self._bad += len(batch.bad)
        for name in batch.bad:
            if name not in self._known:
                self._known.add(name)
                self.names.append(name)
                log.warning("skipped %s", name)
        if self._seen >= self._ENOUGH:
            self.check()

    def state_dict(self) -> dict[str, Any]:
        """Names and counts, in plain types."""
        return {"names": list(self.names), "seen": self._seen, "bad": self._bad}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on counting, and tell of no file again."""
        self.names = list(state["names"])
        self._known = set(self.names)
        self._seen, self._bad = state["seen"], state["bad"]

    def check(self) -> None:
        """Check the share however few images were seen: call it after the last batch.

        Raises:
            UserError: when more than the limit cannot be read.
        """
        if self._bad > self.limit * self._seen:
            share = f"{self._bad} of {self._seen} images could not be read, over data.bad_fraction={self.limit:g}"
            fix = "repair or remove them, or raise data.bad_fraction"
            raise UserError(f"{share}: {fix}; the first is {self.names[0]}")
