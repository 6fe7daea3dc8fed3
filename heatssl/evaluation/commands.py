"""``heatssl knn`` and ``heatssl probe``: numbers with their protocol, beside those of random weights."""

import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from heatssl.config import EvaluationConfig, KnnConfig, ProbeConfig
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.knn import knn_accuracy
from heatssl.evaluation.linear import save_probe
from heatssl.evaluation.probe import linear_probe
from heatssl.evaluation.results import Result, append_results, commit, format_table, hardware
from heatssl.evaluation.source import Source, cached_features, fingerprint, open_source

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # train_x, train_y, test_x, test_y


@permission_errors()
def run_knn(config: KnnConfig) -> list[Result]:
    """Classify val by its neighbours in train, print the table, add it to ``evaluation.json``.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    source = open_source(config)
    vote = "majority vote" if config.temperature is None else f"votes exp(cosine / {config.temperature:g})"
    method = f"{config.k} nearest neighbours by cosine, {vote}"

    def measure(weights: str, backbone: nn.Module) -> Result:
        def accuracy(features: Features, _classes: list[str]) -> float:
            return knn_accuracy(*features, k=config.k, temperature=config.temperature)

        return _measure("knn", weights, backbone, source, config, method, accuracy)

    return _finish(source, [measure(*each) for each in _backbones(source, config.random_init, config.seed)])


@permission_errors()
def run_probe(config: ProbeConfig) -> list[Result]:
    """Train a linear probe on train, test it on val once, print the table, add it to ``evaluation.json``.

    The probe of the weights is kept as ``probe.safetensors`` beside it.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    source = open_source(config)
    if config.solver == "sgd":
        trained, chosen, length = "SGD", "learning rate", f"{config.epochs} epochs"
    else:
        trained, chosen, length = "logistic regression", "L2", f"{config.iterations} iterations"
    method = (
        f"{trained} on standardised features, {chosen} selected on {100 * config.held_out:g} % of train, "
        f"retrained on all of it, {length}"
    )

    def measure(weights: str, backbone: nn.Module) -> Result:
        def accuracy(features: Features, classes: list[str]) -> float:
            found = linear_probe(
                *features,
                solver=config.solver,
                grid=config.grid,
                iterations=config.iterations,
                epochs=config.epochs,
                held_out=config.held_out,
                seed=config.seed,
            )
            if weights == "pretrained":
                save_probe(source.output / "probe.safetensors", found.probe, classes, fingerprint(backbone))
            return found.accuracy

        return _measure("linear", weights, backbone, source, config, method, accuracy)

    return _finish(source, [measure(*each) for each in _backbones(source, config.random_init, config.seed)])


def _backbones(source: Source, random_init: bool, seed: int) -> list[tuple[str, nn.Module]]:
    given = [("random_init" if source.name.endswith("?random") else "pretrained", source.backbone)]
    return given + ([("random_init", source.twin(seed))] if random_init and given[0][0] == "pretrained" else [])


def _measure(
    metric: str,
    weights: str,
    backbone: nn.Module,
    source: Source,
    config: EvaluationConfig,
    method: str,
    accuracy: Callable[[Features, list[str]], float],
) -> Result:
    start = time.perf_counter()
    train, train_x, train_y = cached_features(backbone, "train", source, config.batch_size)
    val, val_x, val_y = cached_features(backbone, "val", source, config.batch_size)
    if train.classes != val.classes:
        raise UserError(f"train and val have different classes: make the folders under {source.data.root} the same")
    split = "held-out" if source.data.held_out else "val"
    # MPS has no float64, which the probe's sums need; there the processor does it.
    place = source.device if source.device.type == "cuda" else torch.device("cpu")
    features = (train_x.to(place), train_y.to(place), val_x.to(place), val_y.to(place))
    return Result(
        metric=metric,
        weights=weights,
        accuracy=accuracy(features, train.classes),
        protocol=(
            f"{method}; mean-pooled frozen features at {source.data.image_size} px, centre crop; "
            f"{len(train_y)} train, {len(val_y)} {split} images; seed {config.seed}"
        ),
        data=source.data.name,
        split=split,
        train_size=len(train_y),
        val_size=len(val_y),
        seed=config.seed,
        seconds=time.perf_counter() - start,
        backbone=source.info.describe(),
        source=source.kind,
        step=source.info.step if weights == "pretrained" else 0,
        hardware=hardware(source.device),
        commit=commit(),
    )


def _finish(source: Source, results: list[Result]) -> list[Result]:
    append_results(source.output / "evaluation.json", results)
    print(format_table(results), flush=True)
    return results
