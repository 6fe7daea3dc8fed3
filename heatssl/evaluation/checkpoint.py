"""Training of an evaluation goes on where it was stopped."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch

from heatssl.files import write_atomically


class Stateful(Protocol):
    """A model, an optimiser: what a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""


class Checkpoint:
    """The state after an epoch, for the very same settings, weights and images.

    Args:
        path: of the file.
        key: of the training, see :meth:`heatssl.evaluation.source.Source.key`; a file of another key counts as none.
        parts: what changes in training, by name.
    """

    def __init__(self, path: Path, key: str, parts: Mapping[str, Stateful]) -> None:
        self.path, self.key, self.parts = path, key, parts

    def load(self) -> int:
        """Go on where it stopped; the number of steps that are done."""
        if not self.path.exists():
            return 0
        found = torch.load(self.path, map_location="cpu", weights_only=True)
        if found["key"] != self.key:
            return 0
        for name, part in self.parts.items():
            part.load_state_dict(found[name])
        print(f"going on from step {found['step']} of {self.path}", flush=True)
        return int(found["step"])

    def save(self, step: int) -> None:
        """Whole or not at all."""
        state = {"key": self.key, "step": step} | {name: part.state_dict() for name, part in self.parts.items()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: torch.save(state, file))

    def remove(self) -> None:
        """The training is over."""
        self.path.unlink(missing_ok=True)
