"""``heatssl knn`` and ``heatssl probe``: numbers with their protocol, beside those of random weights."""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heatssl.config import EvaluationConfig, KnnConfig, ProbeConfig
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.few_shot import few_shot_probe
from heatssl.evaluation.knn import knn_accuracy
from heatssl.evaluation.linear import save_probe
from heatssl.evaluation.probe import SGD_EPOCHS, linear_probe
from heatssl.evaluation.results import Result, append_results, commit, format_table, hardware
from heatssl.evaluation.source import Source, cached_features, fingerprint, open_source, split_maps
from heatssl.evaluation.token_probe import BATCH, EPOCHS, HEADS, token_probe, trial_epochs

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # train_x, train_y, test_x, test_y


class Accuracy(NamedTuple):
    """Of one protocol: the mean where it has several draws, and their deviation."""

    mean: float
    deviation: float | None = None


METHODS = {  # by head of the probe
    "linear": "logistic regression",
    "attentive": "one attending query and a linear classifier",
    "block": "one transformer block, mean over positions and a linear classifier",
}


@permission_errors()
def run_knn(config: KnnConfig) -> list[Result]:
    """Classify val by its neighbours in train, print the table, add it to ``evaluation.json``.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    source = open_source(config)
    return finish(source, measure_knn(source, config))


def measure_knn(source: Source, config: KnnConfig) -> list[Result]:
    """What :func:`run_knn` prints and keeps, of a source that is open."""
    vote = "majority vote" if config.temperature is None else f"votes exp(cosine / {config.temperature:g})"
    method = f"{config.k} nearest neighbours by cosine, {vote}"

    def measure(weights: str, backbone: nn.Module) -> Result:
        def accuracy(features: Features, _classes: list[str]) -> Accuracy:
            return Accuracy(knn_accuracy(*features, k=config.k, temperature=config.temperature))

        return _measure("knn", weights, backbone, source, config, method, accuracy)

    return [measure(*each) for each in backbones_of(source, config.random_init, config.seed)]


@permission_errors()
def run_probe(config: ProbeConfig) -> list[Result]:
    """Train a probe on train, test it on val once, print the table, add it to ``evaluation.json``.

    The linear probe of the weights is kept as ``probe.safetensors`` beside it; other heads are not kept.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    if config.head not in METHODS:
        raise UserError(f"unknown head {config.head!r}: choose one of {', '.join(METHODS)}")
    if is_few(config) and (config.head != "linear" or config.solver != "logistic_regression"):
        raise UserError("shots and share are for head=linear and solver=logistic_regression: leave the others out")
    source = open_source(config)
    return finish(source, measure_probe(source, config, keep=True))


def measure_probe(source: Source, config: ProbeConfig, *, keep: bool) -> list[Result]:
    """What :func:`run_probe` prints, of a source that is open; ``keep`` the linear probe in a file."""

    def measure(weights: str, backbone: nn.Module) -> Result:
        def linear(features: Features, classes: list[str]) -> Accuracy:
            found = linear_probe(
                *features,
                solver=config.solver,
                grid=config.grid,
                iterations=config.iterations,
                epochs=SGD_EPOCHS if config.epochs is None else config.epochs,
                held_out=config.held_out,
                seed=config.seed,
            )
            if keep and weights == "pretrained":
                save_probe(source.output / "probe.safetensors", found.probe, classes, fingerprint(backbone))
            return Accuracy(found.accuracy)

        def few(features: Features, _classes: list[str]) -> Accuracy:
            found = few_shot_probe(
                *features, shots=config.shots, share=config.share, draws=config.draws, seed=config.seed
            )
            return Accuracy(found.accuracy, found.deviation)

        def token(maps: Features, _classes: list[str]) -> Accuracy:
            found = token_probe(
                *maps,
                head=config.head,
                learning_rates=config.grid,
                epochs=config.epochs,
                held_out=config.held_out,
                seed=config.seed,
                device=source.device,
                progress=True,
            )
            return Accuracy(found.accuracy)

        accuracy = token if config.head in HEADS else few if is_few(config) else linear
        return _measure(_metric(config), weights, backbone, source, config, _probe_method(config), accuracy)

    return [measure(*each) for each in backbones_of(source, config.random_init, config.seed)]


def is_few(config: ProbeConfig) -> bool:
    """Whether the probe has few labels."""
    return config.shots is not None or config.share is not None


def _metric(config: ProbeConfig) -> str:
    if not is_few(config):
        return config.head
    return f"{config.shots}-shot" if config.shots is not None else f"{100 * (config.share or 0):g} % labels"


def _probe_method(config: ProbeConfig) -> str:
    """What the protocol says about the classifier and how it is trained."""
    if is_few(config):
        few = f"{config.shots} images of each class" if config.shots is not None else f"{config.share:g} of train"
        return f"{METHODS['linear']} on standardised features, C = 1, on {few}, mean of {config.draws} draws"
    selected = f"selected on {100 * config.held_out:g} % of train"
    if config.head != "linear":
        epochs = EPOCHS[config.head] if config.epochs is None else config.epochs
        return (
            f"{METHODS[config.head]} on standardised channels, AdamW in batches of {BATCH}, "
            f"learning rate {selected} in {trial_epochs(epochs)} epochs, retrained on all of it, {epochs} epochs"
        )
    if config.solver == "sgd":
        epochs = SGD_EPOCHS if config.epochs is None else config.epochs
        trained, chosen, length = "SGD", "learning rate", f"{epochs} epochs"
    else:
        trained, chosen, length = METHODS["linear"], "L2", f"at most {config.iterations} iterations"
    return f"{trained} on standardised features, {chosen} {selected}, retrained on all of it, {length}"


def backbones_of(source: Source, random_init: bool, seed: int) -> list[tuple[str, nn.Module]]:
    """What is measured: the weights, and beside them, when asked for, their random twin."""
    given = [("random_init" if source.name.endswith("?random") else "pretrained", source.backbone)]
    return given + ([("random_init", source.twin(seed))] if random_init and given[0][0] == "pretrained" else [])


def _measure(
    metric: str,
    weights: str,
    backbone: nn.Module,
    source: Source,
    config: EvaluationConfig,
    method: str,
    accuracy: Callable[[Features, list[str]], Accuracy],
) -> Result:
    start = time.perf_counter()
    maps = metric in HEADS
    read = split_maps if maps else cached_features
    train, train_x, train_y = read(backbone, "train", source, config.batch_size)
    val, val_x, val_y = read(backbone, "val", source, config.batch_size)
    if train.classes != val.classes:
        raise UserError(f"train and val have different classes: make the folders under {source.data.root} the same")
    # Maps go to the device by the batch. MPS has no float64, which the sums of the others need; there the processor
    # does it.
    place = source.device if source.device.type == "cuda" and not maps else torch.device("cpu")
    features = (train_x.to(place), train_y.to(place), val_x.to(place), val_y.to(place))
    shape = " x ".join(map(str, train_x.shape[1:]))
    found = accuracy(features, train.classes)
    what = f"frozen feature maps ({shape})" if maps else "mean-pooled frozen features"
    sizes = (len(train_y), len(val_y))
    return result_of(source, weights, metric, found, f"{method}; {what}", sizes, config.seed, start)


def result_of(
    source: Source,
    weights: str,
    metric: str,
    accuracy: Accuracy,
    about: str,
    sizes: tuple[int, int],
    seed: int,
    start: float,
    split: str | None = None,
    view: str = "centre crop",
) -> Result:
    """A number with all that it takes to trust it.

    Args:
        source: what was measured.
        weights: ``pretrained`` or ``random_init``.
        metric: its name.
        accuracy: what was found.
        about: the protocol, as far as images and seed do not say it.
        sizes: images of train, and of those that were tested.
        seed: of the protocol.
        start: ``time.perf_counter()`` when it began.
        split: what was tested; None: what the source's settings have for val.
        view: how images became squares.
    """
    split = source.split if split is None else split
    return Result(
        metric=metric,
        weights=weights,
        accuracy=accuracy.mean,
        deviation=accuracy.deviation,
        protocol=(
            f"{about} at {source.data.image_size} px, {view}; {sizes[0]} train, {sizes[1]} {split} images; seed {seed}"
        ),
        data=source.data.name,
        split=split,
        train_size=sizes[0],
        val_size=sizes[1],
        seed=seed,
        seconds=time.perf_counter() - start,
        backbone=source.info.describe(),
        source=source.kind,
        step=source.info.step if weights == "pretrained" else 0,
        hardware=hardware(source.device),
        commit=commit(),
    )


def finish(source: Source, results: list[Result]) -> list[Result]:
    """Keep the results in ``evaluation.json`` and print them."""
    append_results(source.output / "evaluation.json", results)
    print(format_table(results), flush=True)
    return results
