"""COCO's average precision, by torchmetrics and pycocotools."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torchmetrics.detection import MeanAveragePrecision

from heatssl.errors import UserError

# pycocotools' own. torchmetrics' come from float32: a recall of 0.3 does not reach its 0.3, and AP is off in the fourth
# digit.
OVERLAPS = np.linspace(0.5, 0.95, 10).tolist()
RECALLS = np.linspace(0.0, 1.0, 101).tolist()


class AveragePrecision(NamedTuple):
    """Means over the classes that are there, in [0, 1]; at most 100 detections of an image count."""

    ap: float  # mean over the intersections over union 0.5, 0.55, ..., 0.95
    ap50: float  # a detection is right from an intersection over union of 0.5 on
    ap75: float


def coco_metric() -> MeanAveragePrecision:
    """The metric, empty.

    Raises:
        UserError: when pycocotools is not installed.
    """
    try:
        return MeanAveragePrecision(iou_thresholds=OVERLAPS, rec_thresholds=RECALLS, backend="pycocotools")
    except ModuleNotFoundError as error:
        raise UserError("average precision needs pycocotools: pip install 'heatssl[detection]'") from error


def average_precision(found: Sequence[dict[str, Tensor]], true: Sequence[dict[str, Tensor]]) -> AveragePrecision:
    """Detections against the boxes that are there, image by image.

    Args:
        found: of each image ``boxes`` (D, 4), left, top, right, bottom in pixels, ``scores`` (D,) and ``labels`` (D,).
        true: ``boxes`` (K, 4), ``labels`` (K,) and ``iscrowd`` (K,).

    Raises:
        UserError: when pycocotools is not installed, or no image has a box to find.
    """
    metric = coco_metric()
    metric.update(list(found), list(true))
    values = metric.compute()
    scores = AveragePrecision(*(values[name].item() for name in ("map", "map_50", "map_75")))
    if scores.ap < 0:  # COCO's mark for: nothing to find
        raise UserError("average precision needs a box to find: no image has one that is no crowd")
    return scores
