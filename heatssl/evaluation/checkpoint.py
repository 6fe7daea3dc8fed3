"""Training of an evaluation goes on where it was stopped."""

import logging
from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any, Protocol

import torch

from heatssl.errors import UserError
from heatssl.evaluation.processes import is_first, rank_and_world, total
from heatssl.files import write_atomically

log = logging.getLogger(__name__)


class Stateful(Protocol):
    """A model, an optimiser: what a checkpoint holds."""

    def state_dict(self) -> dict[str, Any]:
        """All that it takes to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""


class Checkpoint:
    """The state after an epoch, for the very same settings, weights and images; of several processes the first writes.

    Args:
        path: of the file.
        key: of the training, see :meth:`heatssl.evaluation.source.Source.key`; a file of another key
            counts as none, and so does a damaged one, which is told of in one line.
        parts: what changes in training, by name.
    """

    def __init__(self, path: Path, key: str, parts: Mapping[str, Stateful]) -> None:
        self.path, self.key, self.parts = path, key, parts

    def load(self) -> int:
        """Go on where it stopped; the number of steps that are done.

        Raises:
            UserError: when one of several processes finds another state than the first.
        """
        step = self._load()
        world = rank_and_world()[1]
        if int(total(torch.tensor(step))) != step * world:
            raise UserError(f"not all processes find the same {self.path}: give an output that they share")
        return step

    def _load(self) -> int:
        before: dict[str, Any] = {}
        try:
            found = torch.load(self.path, map_location="cpu", weights_only=True)
            if found["key"] != self.key:
                return 0
            step = int(found["step"])
            before = {name: deepcopy(part.state_dict()) for name, part in self.parts.items()}
            for name, part in self.parts.items():
                part.load_state_dict(found[name])
        except FileNotFoundError:
            return 0
        except PermissionError:  # what cannot be read cannot be replaced either
            raise
        except Exception as error:  # noqa: BLE001 - files are broken in many ways
            for name, state in before.items():  # of which some may have been loaded
                self.parts[name].load_state_dict(state)
            if is_first():
                reason = " ".join(str(error).split())[:100]
                log.warning("%s is damaged or cannot be read (%s): training begins again", self.path, reason)
            return 0
        if is_first():
            print(f"going on from step {step} of {self.path}", flush=True)
        return step

    def save(self, step: int) -> None:
        """Whole or not at all."""
        if not is_first():
            return
        state = {"key": self.key, "step": step} | {name: part.state_dict() for name, part in self.parts.items()}
        write_atomically(self.path, lambda file: torch.save(state, file))

    def remove(self) -> None:
        """Nobody will ask for it again."""
        if is_first():
            self.path.unlink(missing_ok=True)
