"""``heatssl knn`` and ``heatssl probe``: numbers with their protocol, beside those of random weights."""

import dataclasses
import time
from typing import NamedTuple

from torch import Tensor, nn

from heatssl.config import KnnConfig, ProbeConfig
from heatssl.data import Split
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.augmented_probe import measure_augmented
from heatssl.evaluation.few_shot import few_shot_probe
from heatssl.evaluation.knn import check_neighbours, knn_accuracies, unit_bank
from heatssl.evaluation.linear import LinearProbe, save_probe
from heatssl.evaluation.measure import Accuracy, backbones_of, begin, finish, result_of
from heatssl.evaluation.probe import linear_probe
from heatssl.evaluation.probe_settings import (
    check_few,
    check_probe,
    epochs_of,
    features_are,
    is_few,
    metric_of,
    probe_method,
)
from heatssl.evaluation.processes import is_first, rank_and_world
from heatssl.evaluation.readout import FINAL, Readout, readouts_of
from heatssl.evaluation.results import Result
from heatssl.evaluation.source import Source, fingerprint
from heatssl.evaluation.split_features import split_features, split_maps, split_readouts
from heatssl.evaluation.token_probe import HEADS, token_probe
from heatssl.evaluation.whitening import Whitening, check_shrinkage, preparation


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
    readouts = readouts_of(source.backbone, [], [config.pooling])
    features = f"{features_are(readouts)}{preparation(config.shrinkage)}"
    vote = "majority vote" if config.temperature is None else f"votes exp(cosine / {config.temperature:g})"
    rank, world = rank_and_world()
    place = source.place
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        train_x, train_y = split_features(backbone, "train", source, config.batch_size, readouts)
        val = split_features(backbone, "val", source, config.batch_size, readouts)
        test_x, test_y = (part.to(place) for part in val)
        prepare = None
        if config.shrinkage is not None:
            prepare = Whitening(train_x, config.shrinkage).to(place)
            test_x = prepare(test_x)
        neighbourhood = (unit_bank(train_x, place, prepare), train_y.to(place), test_x, test_y)
        found = knn_accuracies(*neighbourhood, ks, config.temperature, rank=rank, world=world, progress=rank == 0)
        for k, accuracy in zip(ks, found, strict=True):
            about = f"{k} nearest neighbours by cosine, {vote}; {features}"
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
    ``augmented_probe.safetensors``; other heads are not kept, nor probes of other layers or poolings.

    Returns:
        The result of the weights, then that of the random twin when asked for.

    Raises:
        UserError: on input that cannot work.
    """
    check_probe(config)
    augmented = config.protocol == "mae"
    source = begin(config, cache=config.cache, several=True)
    measure = measure_augmented if augmented else measure_probe
    return finish(source, measure(source, config, keep=True))


def measure_probe(source: Source, config: ProbeConfig, *, keep: bool) -> list[Result]:
    """What :func:`run_probe` prints, of a source that is open; ``keep`` the linear probe in a file."""
    check_few(config, source.splits["train"].labels)
    measure = _of_maps if config.head in HEADS else _few if is_few(config) else _linear
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        found, features, sizes, probe = measure(source, config, backbone)
        # What reads other features than all that will use the probe is of no use to them.
        if probe is not None and keep and weights == "pretrained" and is_first():
            save_probe(source.probe_file, probe, source.splits["train"].classes, fingerprint(backbone))
        about = f"{probe_method(config)}; {features}"
        results.append(result_of(source, weights, metric_of(config), found, about, sizes, config, start))
    return results


class Measured(NamedTuple):
    """What a probe found."""

    accuracy: Accuracy
    features: str  # that it read
    sizes: tuple[int, int]  # images of train and val
    probe: LinearProbe | None = None  # of the features that everybody reads


def _linear(source: Source, config: ProbeConfig, backbone: nn.Module) -> Measured:
    readouts = readouts_of(backbone, config.layers, config.pooling)
    (train_x, train_y), (val_x, val_y) = _both_splits(source, config, backbone, readouts)
    found = linear_probe(
        train_x,
        train_y,
        val_x,
        val_y,
        solver=config.solver,
        grid=config.grid,
        iterations=config.iterations,
        epochs=epochs_of(config),
        held_out=config.held_out,
        seed=config.seed,
        progress=is_first(),
    )
    selected = str(readouts[found.reading]) if len(readouts) > 1 else ""
    return Measured(
        Accuracy(found.accuracy, selected=selected),
        features_are(readouts),
        (len(train_y), len(val_y)),
        found.probe if readouts == (FINAL,) else None,
    )


def _few(source: Source, config: ProbeConfig, backbone: nn.Module) -> Measured:
    readouts = readouts_of(backbone, config.layers, config.pooling)
    (train_x, train_y), (val_x, val_y) = _both_splits(source, config, backbone, readouts)
    found = few_shot_probe(
        train_x[0],
        train_y,
        val_x[0],
        val_y,
        shots=config.shots,
        share=config.share,
        draws=config.draws,
        seed=config.seed,
        progress=is_first(),
    )
    sizes = (len(train_y), len(val_y))
    return Measured(Accuracy(found.accuracy, found.deviation), features_are(readouts), sizes)


def _of_maps(source: Source, config: ProbeConfig, backbone: nn.Module) -> Measured:
    train_maps, train_y = split_maps(backbone, "train", source, config.batch_size)
    val_maps, val_y = split_maps(backbone, "val", source, config.batch_size)
    found = token_probe(
        train_maps,
        train_y,
        val_maps,
        val_y,
        head=config.head,
        depth=config.depth,
        learning_rates=config.grid,
        epochs=config.epochs,
        held_out=config.held_out,
        seed=config.seed,
        device=source.device,
        progress=is_first(),
    )
    shape = " x ".join(map(str, train_maps.shape[1:]))
    return Measured(Accuracy(found.accuracy), f"frozen feature maps ({shape})", (len(train_y), len(val_y)))


def _both_splits(
    source: Source, config: ProbeConfig, backbone: nn.Module, readouts: tuple[Readout, ...]
) -> list[tuple[list[Tensor], Tensor]]:
    """Of train and val: features (N, C) of each readout, and labels (N,), where they are classified."""
    splits: tuple[Split, Split] = ("train", "val")
    found = [split_readouts(backbone, split, source, config.batch_size, readouts) for split in splits]
    return [([view.to(source.place) for view in views], labels.to(source.place)) for views, labels in found]
