"""``heatssl detect``: boxes around objects, found in frozen feature maps."""

import time
from functools import partial

from torch import nn

from heatssl.config import DetectConfig
from heatssl.data import Boxed, Split, Squares, open_boxed
from heatssl.errors import UserError, permission_errors
from heatssl.evaluation.average_precision import average_precision, coco_metric
from heatssl.evaluation.checks import check_numbers
from heatssl.evaluation.detection import GRADIENT_CLIP, WARMUP, find_boxes, train_detector, true_boxes
from heatssl.evaluation.detector import check_detector
from heatssl.evaluation.frozen_maps import FrozenMaps
from heatssl.evaluation.measure import Accuracy, backbones_of, begin, finish, result_of
from heatssl.evaluation.results import Result
from heatssl.evaluation.source import Source
from heatssl.evaluation.whitening import check_shrinkage, preparation


@permission_errors()
def run_detect(config: DetectConfig) -> list[Result]:
    """Learn from the boxes of train, measure on those of val, print the table, add it to ``evaluation.json``.

    Returns:
        Three results of the weights, then those of the random twin when asked for; their accuracies are COCO's AP, AP50
        and AP75.

    Raises:
        UserError: on input that cannot work.
    """
    _check_settings(config)
    coco_metric()  # that it is missing should not be found out after hours
    source = begin(config)
    train, val = (open_boxed(source.data, split, config.mask_value) for split in ("train", "val"))
    if train.classes != val.classes:
        told = (", ".join(data.classes) for data in (train, val))
        raise UserError("train has boxes of {}, val of {}: give both the same categories".format(*told))
    for split, data in (("train", train), ("val", val)):
        if all(boxes.crowd.all() for boxes in data.boxes):
            raise UserError(f"no image of {split} has a box that is no crowd: there is nothing to detect")
    results = []
    for weights, backbone in backbones_of(source, config.random_init, config.seed):
        results += _measure(weights, backbone, source, config, train, val)
    return finish(source, results)


def _check_settings(config: DetectConfig) -> None:
    check_detector(config.width, config.scales)
    if config.epochs < 1 or config.batch_size < 1:
        raise UserError("epochs and batch_size must be at least 1")
    check_numbers(config, over_zero=["learning_rate"], not_negative=["weight_decay"])
    check_shrinkage(config.shrinkage)


def _measure(
    weights: str, backbone: nn.Module, source: Source, config: DetectConfig, train: Boxed, val: Boxed
) -> list[Result]:
    start = time.perf_counter()
    size = source.data.image_size
    boxes = train.boxes + [each.mirrored() for each in train.boxes if config.flip]
    learned, tested = (
        FrozenMaps(backbone, Squares(data.images, size, mirror=mirror), source.data, source.device)
        for data, mirror in ((train, config.flip), (val, False))
    )
    images: dict[Split, str] = {"train": train.digest(), "val": val.digest()}
    key = source.key("detection", config, images)
    detector = train_detector(
        learned,
        boxes,
        len(train.classes),
        width=config.width,
        scales=config.scales,
        epochs=config.epochs,
        batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        shrinkage=config.shrinkage,
        seed=config.seed,
        checkpoint=partial(source.checkpoint, "detect", weights, key),
    )
    scores = average_precision(find_boxes(detector, tested, config.batch_size), true_boxes(val.boxes, size))
    mirrored = ", mirror images as well" if config.flip else ""
    about = (
        f"of {len(train.classes)} classes; FCOS of width {config.width} over a simple feature pyramid of scales "
        f"{', '.join(f'{scale:g}' for scale in config.scales)}, AdamW {config.learning_rate:g}, weight decay "
        f"{config.weight_decay:g}, {config.epochs} epochs in batches of {config.batch_size}, "
        f"{100 * WARMUP:g} % of them warm-up, then cosine, gradients clipped at norm {GRADIENT_CLIP:g}{mirrored}; "
        f"frozen feature maps{preparation(config.shrinkage)} ({' x '.join(map(str, learned.shape))})"
    )
    told = {
        "AP": (scores.ap, "COCO's average precision, mean over IoU 0.5 to 0.95,"),
        "AP50": (scores.ap50, "COCO's average precision at IoU 0.5"),
        "AP75": (scores.ap75, "COCO's average precision at IoU 0.75"),
    }
    sizes = (len(train.boxes), len(val.boxes))
    return [
        result_of(
            source,
            weights,
            f"detection {name}",
            Accuracy(score),
            f"{what} {about}",
            sizes,
            config,
            start,
            images=images,
            view="whole images stretched to squares",
        )
        for name, (score, what) in told.items()
    ]
