"""``heatssl segment``: classes of pixels, read from frozen feature maps."""

import time

import torch
from torch import Tensor, nn

from heatssl.config import SegmentConfig
from heatssl.data import MaskedData, Split
from heatssl.data.crop import centre_crop_mask
from heatssl.data.masked import read_mask
from heatssl.errors import UserError, check_choice, permission_errors
from heatssl.evaluation.features import extract_all_maps
from heatssl.evaluation.measure import Accuracy, backbones_of, begin, finish, result_of
from heatssl.evaluation.results import Result
from heatssl.evaluation.segmentation import (
    EPOCHS,
    IGNORED,
    check_counted,
    knn_segmentation,
    linear_segmentation,
    split_rows,
)
from heatssl.evaluation.source import Source
from heatssl.progress_bar import progress_bar
from heatssl.unused import refuse_unused

METRICS = {"linear": "segmentation", "knn": "kNN segmentation"}  # by method
UNUSED = {"linear": ["k", "temperature"], "knn": ["epochs", "held_out"]}  # settings of the other one


@permission_errors()
def run_segment(config: SegmentConfig) -> list[Result]:
    """Learn from the masks of train, measure on those of val, print the table, add it to ``evaluation.json``.

    Returns:
        The result of the weights, then that of the random twin when asked for; their accuracy is the mean
        intersection over union.

    Raises:
        UserError: on input that cannot work.
    """
    check_choice("method", config.method, METRICS, UserError)
    refuse_unused(config, UNUSED[config.method], f"method={config.method}")
    source = begin(config)
    return finish(source, measure_segment(source, config))


def measure_segment(source: Source, config: SegmentConfig) -> list[Result]:
    """What :func:`run_segment` prints and keeps, of a source that is open."""
    train, val = source.masked_splits["train"], source.masked_splits["val"]
    size = source.data.image_size
    train_masks, val_masks = _masks(train, size, "train"), _masks(val, size, "val")
    values = sorted(set(train_masks.unique().tolist()) - set(config.ignore))
    unknown = sorted(set(val_masks.unique().tolist()) - set(values) - set(config.ignore))
    if unknown:
        raise UserError(
            f"masks of {source.split} hold {unknown}, which those of train lack: leave it out with ignore={unknown}"
        )
    if len(values) < 2:
        raise UserError(f"masks of train hold {values} and nothing else: segmentation needs two classes")
    masks = tuple(_classes(each, values) for each in (train_masks, val_masks))
    check_counted(masks[1], source.split)  # before features cost time
    if config.method == "linear":
        split_rows(masks[0], config.held_out, config.seed)
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        results.append(_measure(weights, backbone, source, config, (train, val), masks, values))
    return results


def _masks(data: MaskedData, size: int, split: Split) -> Tensor:
    """Centre crops of all masks, (N, S, S) uint8 as they are in the files."""
    numbers = progress_bar(range(len(data)), name=f"masks of {split}")
    return torch.stack([centre_crop_mask(read_mask(data, i), size) for i in numbers])


def _classes(masks: Tensor, values: list[int]) -> Tensor:
    """Values of files as classes from 0 on; all others are ignored."""
    table = torch.full((256,), IGNORED, dtype=torch.uint8)
    table[torch.tensor(values)] = torch.arange(len(values), dtype=torch.uint8)
    return table[masks.long()]


def _measure(
    weights: str,
    backbone: nn.Module,
    source: Source,
    config: SegmentConfig,
    splits: tuple[MaskedData, MaskedData],
    masks: tuple[Tensor, ...],
    values: list[int],
) -> Result:
    start = time.perf_counter()
    maps = [
        extract_all_maps(backbone, data, source.data, batch_size=config.batch_size, device=source.device)
        for data in splits
    ]
    inputs = (maps[0], masks[0], maps[1], masks[1], len(values))
    if config.method == "knn":
        found_scores = knn_segmentation(
            *inputs, k=config.k, temperature=config.temperature, device=source.place, progress=True
        )
        method = f"{config.k} nearest positions by cosine, votes exp(cosine / {config.temperature:g})"
    else:
        epochs = EPOCHS if config.epochs is None else config.epochs
        found_scores, _ = linear_segmentation(
            *inputs, epochs=epochs, held_out=config.held_out, seed=config.seed, device=source.device, progress=True
        )
        method = (
            f"linear layer on standardised channels, AdamW, {epochs} epochs, learning rate selected on "
            f"{100 * config.held_out:g} % of train, retrained on all of it"
        )
    ignored = f", {config.ignore} ignored" if config.ignore else ""
    by_value = ", ".join(f"{value}: {100 * iou:.1f}" for value, iou in zip(values, found_scores.ious, strict=True))
    right = f"pixels right {100 * found_scores.pixel_accuracy:.1f} %"
    print(f"{weights}: {right}, intersection over union in % of class {by_value}", flush=True)
    shape = " x ".join(map(str, maps[0].shape[1:]))
    return result_of(
        source,
        weights,
        METRICS[config.method],
        Accuracy(found_scores.mean_iou),
        f"mean intersection over union of classes {values}{ignored}; {method}; frozen feature maps ({shape})",
        (len(masks[0]), len(masks[1])),
        config,
        start,
    )
