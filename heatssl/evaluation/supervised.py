"""Training on labels: the loop that fine-tuning and MAE's linear probe share, and the state it goes on from."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from heatssl.config import DataConfig
from heatssl.data import BadFiles, ImageData, augment, normalise, steps_per_epoch, train_loader
from heatssl.errors import UserError
from heatssl.export import write_atomically
from heatssl.schedule import warmup_cosine


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


@dataclass(frozen=True)
class Plan:
    """How long, in what steps."""

    epochs: int
    warmup_epochs: float
    batch_size: int
    seed: int  # of order, crops, and all that is drawn in a step
    gradient_clip: float = 0.0  # largest gradient norm; 0: none


def train_on_labels(
    loss: Callable[[Tensor, Tensor], Tensor],
    optimizer: torch.optim.Optimizer,
    images: ImageData,
    data: DataConfig,
    plan: Plan,
    checkpoint: Checkpoint,
    device: torch.device,
    *,
    name: str,
    after_step: Callable[[int], object] | None = None,
) -> None:
    """Minimise ``loss`` of augmented, normalised images (B, 3, S, S) and labels (B,).

    The learning rate of each group (times its ``lr_scale``, where it has one) is its peak, after a linear warm-up; half
    a cosine takes it to zero. After every epoch the state is written; it is removed when all is done.

    Raises:
        UserError: when the loss is not finite, or too many files cannot be read.
    """
    per_epoch = steps_per_epoch(images, plan.batch_size)
    steps = per_epoch * plan.epochs
    warmup = min(round(plan.warmup_epochs * per_epoch), steps - 1)
    peaks = [group["lr"] * group.get("lr_scale", 1.0) for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    first = checkpoint.load()
    loader = train_loader(images, data, batch_size=plan.batch_size, seed=plan.seed, start_step=first)
    bad = BadFiles(data.bad_fraction)
    with tqdm(total=steps, initial=first, desc=name, unit="step", delay=2, leave=False, disable=None) as bar:
        for step, batch in zip(range(first, steps), loader, strict=False):
            bad.update(batch)
            if len(batch.images) < 2:
                raise UserError(f"hardly an image of step {step} can be read ({batch.bad[0]}): replace it")
            torch.manual_seed(plan.seed + step)
            np.random.seed((plan.seed + step) % 2**32)  # noqa: NPY002 (timm's mixup draws from it)
            share = warmup_cosine(step, warmup, steps)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * share
            shown = normalise(augment(batch.images.to(device), data), data)
            found = loss(shown, batch.labels.to(device))
            if not torch.isfinite(found):
                raise UserError(f"the loss of step {step} is {found.item()}: lower the learning rate")
            optimizer.zero_grad(set_to_none=True)
            found.backward()
            nn.utils.clip_grad_norm_(parameters, plan.gradient_clip or math.inf)
            optimizer.step()
            if after_step is not None:
                after_step(step)
            bar.update()
            bar.set_postfix(loss=f"{found.item():.3f}", refresh=False)
            if (step + 1) % per_epoch == 0:
                checkpoint.save(step + 1)
    bad.check()
    checkpoint.path.unlink(missing_ok=True)
