"""A linear classifier of standardised features, and its file."""

import json
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation.accuracy import accuracy
from heatssl.files import write_atomically

ROWS = 8192  # features that are worked on at a time


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised features."""

    weight: Tensor  # (K, C)
    bias: Tensor  # (K,)
    mean: Tensor  # (C,) of the training features
    std: Tensor  # (C,)

    def logits(self, x: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, K); differentiable in the features."""
        probe = self.to(x.device)
        return F.linear((x.to(probe.mean.dtype) - probe.mean) / probe.std, probe.weight, probe.bias)

    def to(self, device: torch.device | str) -> "LinearProbe":
        """The same probe on another device."""
        return LinearProbe(*(tensor.to(device) for tensor in (self.weight, self.bias, self.mean, self.std)))


@torch.no_grad()
def accuracy_and_loss(probe: LinearProbe, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy on features (N, C) and labels (N,)."""
    logits = torch.cat([probe.logits(rows) for rows in x.split(ROWS)])
    return accuracy(logits.argmax(dim=1), y), F.cross_entropy(logits, y).item()


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation (C,) per channel of features (N, C) or maps (N, C, h, w), in float64 and by chunks.

    A constant channel gets deviation one.
    """
    positions = x[0, 0].numel()
    chunks, count = x.split(max(1, ROWS // positions)), len(x) * positions
    mean = torch.stack([as_rows(chunk).sum(dim=0) for chunk in chunks]).sum(dim=0) / count
    squares = torch.stack([(as_rows(chunk) - mean).square().sum(dim=0) for chunk in chunks])
    std = (squares.sum(dim=0) / count).sqrt()
    # Rounding noise of a constant channel must not be blown up to unit size.
    std = torch.where(std > 1e-6 * (mean.abs() + std.mean()), std, 1.0)
    return mean.float(), std.float()


def as_rows(x: Tensor) -> Tensor:
    """One row for each image or position: (N, C, ...) -> (n, C), in float64."""
    return x.double().movedim(1, -1).flatten(0, -2)


def save_probe(path: Path, probe: LinearProbe, classes: list[str], weights: str = "") -> None:
    """Write weight, bias, mean and std, whole or not at all.

    Args:
        path: ``probe.safetensors``.
        probe: moved to the CPU for the file.
        classes: names of the classes (metadata ``classes``, JSON).
        weights: fingerprint of the backbone whose features the probe reads (metadata ``weights``).
    """
    tensors = {name: getattr(probe, name).cpu().contiguous() for name in ("weight", "bias", "mean", "std")}
    content = safetensors.torch.save(tensors, metadata={"classes": json.dumps(classes), "weights": weights})
    write_atomically(path, lambda file: file.write(content))


def load_probe(path: Path, weights: str = "", command: str = "") -> tuple[LinearProbe, list[str]]:
    """The probe and its classes' names.

    Args:
        path: what :func:`save_probe` wrote.
        weights: fingerprint of the backbone that it will be used with; empty: no check.
        command: that makes it, for messages; empty: that of the last weights of the run it lies in.

    Raises:
        UserError: when the file is missing or damaged, or belongs to other weights.
    """
    command = f"`{command or f'heatssl probe run={path.parent}'}`"
    if not path.exists():
        raise UserError(f"{path} does not exist: run {command} first")
    path.open("rb").close()  # safetensors would call a forbidden file a missing one
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            classes = json.loads(metadata["classes"])
            probe = LinearProbe(*(file.get_tensor(name) for name in ("weight", "bias", "mean", "std")))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): run {command} again") from error
    if weights and metadata.get("weights") != weights:
        raise UserError(f"{path} was trained on other weights, those of an earlier or later step: run {command} again")
    return probe, classes
