"""extrapolation.npz: what a run's law makes of a quarter's features, and how far it is from what is there."""

from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from heatssl import objectives
from heatssl.attribution.components import principal_components
from heatssl.attribution.features import COLOURS, colours
from heatssl.config_file import load_config
from heatssl.errors import UserError
from heatssl.export import first_mismatch
from heatssl.files import write_atomically
from heatssl.objectives import Extrapolation, Objective


def write_extrapolation(path: Path, run: Path | None, images: Tensor, names: list[str], chunk: int) -> None:
    """Write the extrapolation of normalised images (N, 3, S, S) by a finished run's law; without one, nothing.

    What an earlier command wrote there goes: it was about other images.

    Arrays: ``image`` (N,) names; ``visible`` (N, h, w) bool; ``seen`` and ``filled`` (N, h, w, 3) float32, colours of
    :func:`heatssl.attribution.features.colours` by the components of ``seen``; ``error`` (N, h, w) and
    ``error_of_mean`` (N, h, w) float32, see :func:`relative_error`, of the law and of the quarter's mean, which knows
    no law.
    """
    path.unlink(missing_ok=True)
    objective = None if run is None else load_objective(run)
    parts = (
        [] if objective is None else [objective.to(images.device).extrapolation(part) for part in images.split(chunk)]
    )
    found = [part for part in parts if part is not None]
    if not found:
        return
    filled, seen, visible = (torch.cat(tensors).cpu() for tensors in zip(*found, strict=True))
    filled, seen = filled.float(), seen.float()
    components = principal_components(seen, COLOURS)
    arrays: dict[str, Any] = {
        "image": np.array(names),
        "visible": visible.numpy(),
        "seen": colours(components, seen),
        "filled": colours(components, filled),
        "error": relative_error(filled, seen).numpy(),
        "error_of_mean": relative_error(quarters_mean(Extrapolation(filled, seen, visible)), seen).numpy(),
    }
    write_atomically(path, lambda file: np.savez_compressed(file, **arrays))


def load_objective(run: Path) -> Objective | None:
    """The objective of a finished run with its weights, in evaluation mode; None when the run has none yet.

    Raises:
        UserError: when the weights are damaged, or are not those of config.yaml.
    """
    path = run / "objective.safetensors"
    if not path.exists():
        return None
    objective = objectives.build(load_config(run / "config.yaml"))
    try:
        tensors = safetensors.torch.load_file(path)
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is damaged ({error}): copy it again or pretrain again") from error
    mismatch = first_mismatch(tensors, objective.state_dict())
    if mismatch:
        raise UserError(f"{path} does not hold the objective of config.yaml beside it: {mismatch}")
    objective.load_state_dict(tensors)
    return objective.eval()


def relative_error(filled: Tensor, seen: Tensor) -> Tensor:
    """Squared distance of fields (N, C, h, w) at each position, (N, h, w), over the variance of ``seen``.

    1 is how far the mean of all positions of all images is from them, on average.
    """
    mean = seen.mean(dim=(0, 2, 3), keepdim=True)
    variance = (seen - mean).square().sum(dim=1).mean()
    return (filled - seen).square().sum(dim=1) / variance.clamp_min(torch.finfo(seen.dtype).tiny)


def quarters_mean(given: Extrapolation) -> Tensor:
    """What the quarter's features are on average, everywhere outside it: (N, C, h, w)."""
    weight = given.visible[:, None].to(given.filled)
    mean = (given.filled * weight).sum(dim=(2, 3), keepdim=True) / weight.sum(dim=(2, 3), keepdim=True)
    return torch.where(given.visible[:, None], given.filled, mean)
