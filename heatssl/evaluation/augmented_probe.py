"""MAE's linear probe (arXiv 2111.06377, A.1, table 10): a linear classifier trained on random crops.

The backbone is frozen, but sees every image anew in each epoch: features cannot be extracted beforehand, and the probe
costs ``epochs`` forward passes of train. LARS (arXiv 1708.03888), momentum 0.9, no weight decay, features standardised
by BatchNorm without affine maps; no augmentation but random resized crops and flips.
"""

import dataclasses
import time
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
import torch.nn.functional as F
from timm.optim import Lars
from torch import Tensor, nn

from heatssl.backbones import evaluation_mode, pooled_features
from heatssl.config import ProbeConfig
from heatssl.data import ImageData, Subset
from heatssl.errors import UserError
from heatssl.evaluation.checks import check_grid
from heatssl.evaluation.held_out import stratified_split
from heatssl.evaluation.linear import LinearProbe, accuracy_and_loss, save_probe
from heatssl.evaluation.measure import Accuracy, backbones_of, result_of
from heatssl.evaluation.processes import gather, is_first
from heatssl.evaluation.results import Result
from heatssl.evaluation.source import Source, fingerprint
from heatssl.evaluation.split_features import extract_shared, split_features
from heatssl.evaluation.supervised import Plan, train_on_labels

METRIC = "linear (MAE)"
EPOCHS = 90
WARM_UP = 1 / 9  # share of the epochs: MAE's 10 of 90
LEARNING_RATE = 0.1  # for a batch of 256: scaled by the batch that is used
CROP_SCALE = [0.08, 1.0]  # torchvision's default, which MAE leaves as it is


class Classifiers(nn.Module):
    """Linear classifiers side by side on features standardised by the statistics of batches: (B, C) -> G of (B, K)."""

    def __init__(self, channels: int, classes: int, count: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(channels, affine=False, eps=1e-6)
        first = nn.Linear(channels, classes)
        nn.init.trunc_normal_(first.weight, std=0.01)
        nn.init.zeros_(first.bias)
        self.heads = nn.ModuleList(deepcopy(first) for _ in range(count))

    def forward(self, features: Tensor) -> list[Tensor]:
        standardised = self.norm(features)
        return [head(standardised) for head in self.heads]

    def probes(self) -> list[LinearProbe]:
        """Each of them, with the running statistics, on the CPU."""
        mean, variance = self.norm.running_mean, self.norm.running_var
        assert mean is not None
        assert variance is not None
        std = (variance + self.norm.eps).sqrt()
        heads: list[Any] = list(self.heads)
        return [LinearProbe(head.weight.detach(), head.bias.detach(), mean, std).to("cpu") for head in heads]


def measure_augmented(source: Source, config: ProbeConfig, *, keep: bool) -> list[Result]:
    """What ``heatssl probe protocol=mae`` prints, of a source that is open; ``keep`` the probe in a file.

    Of several base learning rates the best on the held-out part of train is taken; none is trained on that part.

    Raises:
        UserError: on settings out of their range, a loss that is not finite, and files that cannot be read.
    """
    rates = tuple(config.grid) or (LEARNING_RATE,)
    check_grid(rates)
    if _epochs(config) < 1 or config.batch_size < 2 or not 0 < config.held_out < 1:
        raise UserError("let epochs be at least 1, batch_size 2, and held_out between 0 and 1")
    train, labels = source.splits["train"], torch.tensor(source.splits["train"].labels)
    fit, held = torch.arange(len(train)), torch.arange(0)
    if len(rates) > 1:
        fit, held = stratified_split(labels, config.held_out, config.seed)
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        start = time.perf_counter()
        probes = _train(backbone, Subset(train, fit.numpy()), source, config, rates, weights)
        best = 0
        if len(rates) > 1:
            chosen = Subset(train, held.numpy())
            x, y = extract_shared(backbone, chosen, source, config.batch_size)
            scores = [(accuracy, -loss) for accuracy, loss in (accuracy_and_loss(probe, x, y) for probe in probes)]
            best = max(range(len(rates)), key=scores.__getitem__)
        if keep and weights == "pretrained" and is_first():
            path = source.output / f"{source.mark}augmented_probe.safetensors"
            save_probe(path, probes[best], train.classes, fingerprint(backbone))
        accuracy, _ = accuracy_and_loss(probes[best], *split_features(backbone, "val", source, config.batch_size))
        sizes = (len(fit), len(source.splits["val"]))
        about = _about(config, rates, rates[best])
        results.append(result_of(source, weights, METRIC, Accuracy(accuracy), about, sizes, config, start))
    return results


def _train(
    backbone: nn.Module, train: ImageData, source: Source, config: ProbeConfig, rates: Sequence[float], weights: str
) -> list[LinearProbe]:
    """One probe for each base learning rate; all see the same crops, and none knows of the others."""
    torch.manual_seed(config.seed)
    backbone.to(source.device)
    channels: int = backbone.num_features  # type: ignore[assignment]
    classifiers = Classifiers(channels, len(train.classes), len(rates)).to(source.device)
    optimizer = lars(classifiers, [rate * config.batch_size / 256 for rate in rates])

    def loss(images: Tensor, labels: Tensor) -> Tensor:
        with torch.no_grad():
            features = pooled_features(backbone, images).float()
        # The backbone is the cost: each process encodes its share, and all train the same classifiers on the whole.
        features, labels = (gather(share) for share in (features, labels))
        return torch.stack([F.cross_entropy(logits, labels) for logits in classifiers(features)]).sum()

    with evaluation_mode(backbone):
        train_on_labels(
            loss,
            optimizer,
            train,
            dataclasses.replace(source.data, crop_scale=CROP_SCALE, flip=True, colour_jitter=0.0, grey=0.0),
            Plan(_epochs(config), WARM_UP * _epochs(config), config.batch_size, config.seed),
            source.checkpoint(
                "augmented_probe",
                weights,
                source.key(METRIC, config),
                {"classifiers": classifiers, "optimizer": optimizer},
            ),
            source.device,
            name="probe",
        )
    return classifiers.probes()


def lars(classifiers: Classifiers, learning_rates: Sequence[float]) -> Lars:
    """MAE's: matrices get a step in proportion to their norm (trust coefficient 0.001), biases a plain one."""
    heads: list[Any] = list(classifiers.heads)
    groups: list[dict[str, Any]] = []
    for head, rate in zip(heads, learning_rates, strict=True):
        groups.append({"params": [head.weight], "lr": rate, "always_adapt": True})
        groups.append({"params": [head.bias], "lr": rate, "always_adapt": False})
    return Lars(groups, momentum=0.9, weight_decay=0.0, trust_coeff=0.001)


def _epochs(config: ProbeConfig) -> int:
    return EPOCHS if config.epochs is None else config.epochs


def _about(config: ProbeConfig, rates: Sequence[float], rate: float) -> str:
    epochs, batch = _epochs(config), config.batch_size
    selected = ""
    if len(rates) > 1:
        share = f"{100 * config.held_out:g} % of train, on which it was not trained"
        selected = f" ({rate:g} of {', '.join(f'{each:g}' for each in rates)} selected on {share})"
    return (
        f"linear classifier trained on random crops of {100 * CROP_SCALE[0]:g} to 100 % and flips for {epochs} epochs "
        f"(MAE's protocol), LARS, learning rate {rate:g} x {batch} / 256 = {rate * batch / 256:g}{selected}, "
        f"{WARM_UP * epochs:.3g} epochs of warm-up, then cosine; BatchNorm without affine maps; "
        "mean-pooled frozen features"
    )
