"""What the settings of ``heatssl probe`` mean: which of them go together, and what a protocol says of them."""

from collections.abc import Sequence

import torch

from heatssl.config import ProbeConfig
from heatssl.errors import UserError, check_choice
from heatssl.evaluation.few_shot import check_draws
from heatssl.evaluation.probe import SGD_EPOCHS, check_probe_settings
from heatssl.evaluation.readout import FINAL, Readout
from heatssl.evaluation.token_probe import BATCH, EPOCHS, check_token_settings, trial_epochs
from heatssl.unused import refuse_unused

PROTOCOLS = ("features", "mae")
METHODS = {  # by head of the probe
    "linear": "logistic regression",
    "attentive": "one attending query and a linear classifier",
    "block": "one transformer block, mean over positions and a linear classifier",
}


def check_probe(config: ProbeConfig) -> None:
    """Before weights and images are opened.

    Raises:
        UserError: on an unknown choice, settings that do not go together or are outside their range.
    """
    plain = config.head == "linear" and config.solver == "logistic_regression"
    check_choice("protocol", config.protocol, PROTOCOLS, UserError)
    check_choice("head", config.head, METHODS, UserError)
    if config.depth < 1 or (config.depth > 1 and config.head != "block"):
        raise UserError(f"depth={config.depth}: head=block has one block or more, and no other head has any")
    if is_few(config) and (not plain or config.protocol != "features"):
        raise UserError("shots and share are for head=linear and solver=logistic_regression: leave the others out")
    if config.protocol == "mae" and not plain:
        raise UserError("protocol=mae has a linear head and LARS: leave head and solver out")
    refuse_unused(config, *_unused(config))
    if config.protocol == "mae":
        return  # looks at its settings before it extracts anything
    if config.head != "linear":
        check_token_settings(config.head, config.depth, config.grid, config.epochs, BATCH, config.held_out)
    elif is_few(config) and _places(config) > 1:
        raise UserError("shots and share leave nothing to select on: give one of layers and one of pooling at most")
    elif not is_few(config):
        check_probe_settings(config.solver, config.grid, config.iterations, epochs_of(config), config.held_out)


def check_few(config: ProbeConfig, labels: Sequence[int]) -> None:
    """Whether there are as many images of each class as a probe of few labels asks for.

    Raises:
        UserError: see :func:`heatssl.evaluation.few_shot.check_draws`.
    """
    if is_few(config):
        check_draws(torch.tensor(labels), config.shots, config.share, config.draws)


def epochs_of(config: ProbeConfig) -> int:
    """Of ``solver=sgd``."""
    return SGD_EPOCHS if config.epochs is None else config.epochs


def _unused(config: ProbeConfig) -> tuple[list[str], str]:
    """Settings that the chosen probe does not look at, and the choice that leaves them so."""
    if config.protocol == "mae":
        one_rate = len(config.grid) < 2
        choice = "protocol=mae and a single learning rate" if one_rate else "protocol=mae"
        return ["iterations", "draws", "layers", "pooling", *(["held_out"] if one_rate else [])], choice
    if is_few(config):
        return ["grid", "iterations", "epochs", "held_out"], "shots or share"
    if config.head != "linear":
        return ["solver", "iterations", "draws", "cache", "layers", "pooling"], f"head={config.head}"
    single = "" if _selects(config) else " and a single point of the grid"
    unused = ["iterations", "draws"] if config.solver == "sgd" else ["epochs", "draws"]
    return [*unused, *(["held_out"] if single else [])], f"solver={config.solver}{single}"


def is_few(config: ProbeConfig) -> bool:
    """Whether the probe has few labels."""
    return config.shots is not None or config.share is not None


def metric_of(config: ProbeConfig) -> str:
    """What results call the probe."""
    if config.depth > 1:
        return f"{config.depth} blocks"
    if not is_few(config):
        return config.head
    return f"{config.shots}-shot" if config.shots is not None else f"{100 * (config.share or 0):g} % labels"


def features_are(readouts: Sequence[Readout]) -> str:
    """What the protocol says about the features; of several, what is selected among."""
    if readouts == (FINAL,):
        return "mean-pooled frozen features"
    if len(readouts) == 1:
        return f"frozen features ({readouts[0]})"
    layers = dict.fromkeys(readout.layer for readout in readouts)
    poolings = dict.fromkeys(readout.pooling for readout in readouts)
    places = "the final layer" if None in layers else f"layers {', '.join(map(str, layers))}"
    return f"frozen features, selected likewise among {places} by {', '.join(poolings)}"


def probe_method(config: ProbeConfig) -> str:
    """What the protocol says about the classifier and how it is trained."""
    if is_few(config):
        few = f"{config.shots} images of each class" if config.shots is not None else f"{config.share:g} of train"
        return f"{METHODS['linear']} on standardised features, C = 1, on {few}, mean of {config.draws} draws"
    among = f" among {', '.join(f'{point:g}' for point in config.grid)}" if config.grid else ""
    selected = f"selected{among} on {100 * config.held_out:g} % of train"
    if config.head != "linear":
        epochs = EPOCHS[config.head] if config.epochs is None else config.epochs
        method = METHODS[config.head]
        if config.depth > 1:
            method = method.replace("one transformer block", f"{config.depth} transformer blocks")
        return (
            f"{method} on standardised channels, AdamW in batches of {BATCH}, "
            f"learning rate {selected} in {trial_epochs(epochs)} epochs, retrained on all of it, {epochs} epochs"
        )
    if config.solver == "sgd":
        trained, point, length = "SGD", "learning rate", f"{epochs_of(config)} epochs"
    else:
        trained, point, length = METHODS["linear"], "L2", f"at most {config.iterations} iterations"
    chosen = f"{selected}, retrained on all of it" if _selects(config) else f"{config.grid[0]:g}"
    return f"{trained} on standardised features, {point} {chosen}, {length}"


def _selects(config: ProbeConfig) -> bool:
    """Whether a linear probe has anything to select."""
    return len(config.grid) != 1 or _places(config) > 1


def _places(config: ProbeConfig) -> int:
    """How many pairs of layer and pooling there are to read at."""
    return max(1, len(config.layers)) * len(config.pooling)
