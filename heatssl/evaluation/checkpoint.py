"""Training of an evaluation goes on where it was stopped."""

import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import torch

from heatssl.config import EvaluationConfig
from heatssl.export import write_atomically

BOOKKEEPING = ("workers", "output", "accelerator")  # may differ from what is continued


class Stateful(Protocol):
    """A model, an optimiser, a schedule."""

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> Any:
        """Go on from there."""


class Checkpoint:
    """The state after an epoch, for the very same settings and weights.

    Args:
        path: the file.
        config: the settings.
        weights: fingerprint of the backbone.
    """

    def __init__(self, path: Path, config: EvaluationConfig, weights: str) -> None:
        settings = {key: value for key, value in dataclasses.asdict(config).items() if key not in BOOKKEEPING}
        self.path = path
        self.key = hashlib.sha256(f"{json.dumps(settings, sort_keys=True)} {weights}".encode()).hexdigest()

    def load(self, *parts: Stateful) -> int:
        """Bring all parts to where they stopped; the number of steps that are done."""
        if not self.path.exists():
            return 0
        found = torch.load(self.path, map_location="cpu", weights_only=True)
        if found["key"] != self.key:
            return 0
        for part, state in zip(parts, found["parts"], strict=True):
            part.load_state_dict(state)
        print(f"going on from step {found['step']} of {self.path}", flush=True)
        return int(found["step"])

    def save(self, step: int, *parts: Stateful) -> None:
        """Whole or not at all."""
        state = {"key": self.key, "step": step, "parts": [part.state_dict() for part in parts]}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, lambda file: torch.save(state, file))

    def remove(self) -> None:
        """The training is over."""
        self.path.unlink(missing_ok=True)
