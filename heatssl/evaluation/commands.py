"""``heatssl knn`` and ``heatssl probe``: numbers with their protocol, beside those of random weights."""

import dataclasses
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

from heatssl.config import KnnConfig, ProbeConfig
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.augmented_probe import measure_augmented
from heatssl.evaluation.few_shot import few_shot_probe
from heatssl.evaluation.knn import check_neighbours, knn_accuracies, unit_bank
from heatssl.evaluation.linear import save_probe
from heatssl.evaluation.measure import Accuracy, backbones_of, begin, finish, result_of
from heatssl.evaluation.probe import SGD_EPOCHS, SOLVERS, linear_probe
from heatssl.evaluation.processes import is_first, rank_and_world
from heatssl.evaluation.results import Result
from heatssl.evaluation.source import Source, fingerprint
from heatssl.evaluation.split_features import split_features, split_maps
from heatssl.evaluation.token_probe import BATCH, EPOCHS, HEADS, token_probe, trial_epochs
from heatssl.evaluation.whitening import Whitening, check_shrinkage, preparation
from heatssl.unused import refuse_unused

Features = tuple[Tensor, Tensor, Tensor, Tensor]  # train_x, train_y, test_x, test_y

PROTOCOLS = ("features", "mae")
METHODS = {  # by head of the probe
    "linear": "logistic regression",
    "attentive": "one attending query and a linear classifier",
    "block": "one transformer block, mean over positions and a linear classifier",
}


@permission_errors()
def run_knn(config: KnnConfig) -> list[Result]:
    """Classify val by its neighbours in train, print the table, add it to ``evaluation.json``.

    Returns:
        The results of the weights, one for each k, then those of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    source = begin(config, cache=config.cache, several=True)
    return finish(source, measure_knn(source, config))


def measure_knn(source: Source, config: KnnConfig) -> list[Result]:
    """What :func:`run_knn` prints and keeps, of a source that is open."""
    ks = neighbours(config)
    check_neighbours(ks, len(source.splits["train"]), config.temperature)
    if config.shrinkage is not None:
        check_shrinkage(config.shrinkage)
    features_are = f"mean-pooled frozen features{preparation(config.shrinkage)}"
    vote = "majority vote" if config.temperature is None else f"votes exp(cosine / {config.temperature:g})"
    rank, world = rank_and_world()
    place = source.place
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        train_x, train_y = split_features(backbone, "train", source, config.batch_size)
        test_x, test_y = (part.to(place) for part in split_features(backbone, "val", source, config.batch_size))
        prepare = None
        if config.shrinkage is not None:
            prepare = Whitening(train_x, config.shrinkage).to(place)
            test_x = prepare(test_x)
        features = (unit_bank(train_x, place, prepare), train_y.to(place), test_x, test_y)
        found = knn_accuracies(*features, ks, config.temperature, rank=rank, world=world, progress=rank == 0)
        for k, accuracy in zip(ks, found, strict=True):
            about = f"{k} nearest neighbours by cosine, {vote}; {features_are}"
            settings = dataclasses.replace(config, k=k)
            sizes = (len(train_y), len(test_y))
            metric = f"{k}-NN" if isinstance(config.k, list) else "knn"
            results.append(result_of(source, weights, metric, Accuracy(accuracy), about, sizes, settings, start))
    return results


def neighbours(config: KnnConfig) -> list[int]:
    """The k that are asked for.

    Raises:
        UserError: when they are no whole numbers.
    """
    ks = config.k if isinstance(config.k, list) else [config.k]
    if not ks or not all(isinstance(k, int) and not isinstance(k, bool) for k in ks):
        raise UserError(f"k={config.k}: expected a whole number, or a list such as [10,20,50]")
    return list(dict.fromkeys(ks))


@permission_errors()
def run_probe(config: ProbeConfig) -> list[Result]:
    """Train a probe on train, test it on val once, print the table, add it to ``evaluation.json``.

    The linear probe of the weights is kept as ``probe.safetensors`` beside it (``best_probe.safetensors``: see
    :attr:`heatssl.evaluation.source.Source.mark`), that of ``protocol=mae`` as
    ``augmented_probe.safetensors``; other heads are not kept.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    _check_probe(config)
    augmented = config.protocol == "mae"
    source = begin(config, cache=config.cache, several=True)
    measure = measure_augmented if augmented else measure_probe
    return finish(source, measure(source, config, keep=True))


def _check_probe(config: ProbeConfig) -> None:
    plain = config.head == "linear" and config.solver == "logistic_regression"
    if config.protocol not in PROTOCOLS:
        raise UserError(f"unknown protocol {config.protocol!r}: choose one of {', '.join(PROTOCOLS)}")
    if config.head not in METHODS:
        raise UserError(f"unknown head {config.head!r}: choose one of {', '.join(METHODS)}")
    if config.depth < 1 or (config.depth > 1 and config.head != "block"):
        raise UserError(f"depth={config.depth}: head=block has one block or more, and no other head has any")
    if is_few(config) and (not plain or config.protocol != "features"):
        raise UserError("shots and share are for head=linear and solver=logistic_regression: leave the others out")
    if config.protocol == "mae" and not plain:
        raise UserError("protocol=mae has a linear head and LARS: leave head and solver out")
    if config.solver not in SOLVERS:
        raise UserError(f"unknown solver {config.solver!r}: choose one of {', '.join(SOLVERS)}")
    refuse_unused(config, *_unused(config))


def _unused(config: ProbeConfig) -> tuple[list[str], str]:
    """Settings that the chosen probe does not look at, and the choice that leaves them so."""
    if config.protocol == "mae":
        one_rate = len(config.grid) < 2
        choice = "protocol=mae and a single learning rate" if one_rate else "protocol=mae"
        return ["iterations", "draws", *(["held_out"] if one_rate else [])], choice
    if is_few(config):
        return ["grid", "iterations", "epochs", "held_out"], "shots or share"
    if config.head != "linear":
        return ["solver", "iterations", "draws", "cache"], f"head={config.head}"
    if config.solver == "sgd":
        return ["iterations", "draws"], "solver=sgd"
    return ["epochs", "draws"], f"solver={config.solver}"


def measure_probe(source: Source, config: ProbeConfig, *, keep: bool) -> list[Result]:
    """What :func:`run_probe` prints, of a source that is open; ``keep`` the linear probe in a file."""
    train = source.splits["train"]

    def linear(features: Features, weights: str, backbone: nn.Module) -> Accuracy:
        found = linear_probe(
            *features,
            solver=config.solver,
            grid=config.grid,
            iterations=config.iterations,
            epochs=SGD_EPOCHS if config.epochs is None else config.epochs,
            held_out=config.held_out,
            seed=config.seed,
            progress=is_first(),
        )
        if keep and weights == "pretrained" and is_first():
            save_probe(source.probe_file, found.probe, train.classes, fingerprint(backbone))
        return Accuracy(found.accuracy)

    def few(features: Features, *_: object) -> Accuracy:
        found = few_shot_probe(
            *features,
            shots=config.shots,
            share=config.share,
            draws=config.draws,
            seed=config.seed,
            progress=is_first(),
        )
        return Accuracy(found.accuracy, found.deviation)

    def token(maps: Features, *_: object) -> Accuracy:
        found = token_probe(
            *maps,
            head=config.head,
            depth=config.depth,
            learning_rates=config.grid,
            epochs=config.epochs,
            held_out=config.held_out,
            seed=config.seed,
            device=source.device,
            progress=is_first(),
        )
        return Accuracy(found.accuracy)

    of_maps = config.head in HEADS
    accuracy: Callable[[Features, str, nn.Module], Accuracy] = token if of_maps else few if is_few(config) else linear
    read = split_maps if of_maps else split_features
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        train_x, train_y = read(backbone, "train", source, config.batch_size)
        val_x, val_y = read(backbone, "val", source, config.batch_size)
        # Maps go to the device by the batch.
        place = torch.device("cpu") if of_maps else source.place
        found = accuracy((train_x.to(place), train_y.to(place), val_x.to(place), val_y.to(place)), weights, backbone)
        shape = " x ".join(map(str, train_x.shape[1:]))
        what = f"frozen feature maps ({shape})" if of_maps else "mean-pooled frozen features"
        sizes = (len(train_y), len(val_y))
        about = f"{_probe_method(config)}; {what}"
        results.append(result_of(source, weights, metric_of(config), found, about, sizes, config, start))
    return results


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


def _probe_method(config: ProbeConfig) -> str:
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
        epochs = SGD_EPOCHS if config.epochs is None else config.epochs
        trained, chosen, length = "SGD", "learning rate", f"{epochs} epochs"
    else:
        trained, chosen, length = METHODS["linear"], "L2", f"at most {config.iterations} iterations"
    return f"{trained} on standardised features, {chosen} {selected}, retrained on all of it, {length}"
