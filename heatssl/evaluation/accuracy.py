"""The share of right answers, the same for every protocol: torchmetrics counts, float64 divides.

torchmetrics' own quotient is float32, and processes can add up counts but no quotients.
"""

from torch import Tensor
from torchmetrics.functional.classification import multiclass_stat_scores


def right_answers(predicted: Tensor, labels: Tensor) -> int:
    """How many predicted classes (N,) are the labels (N,), whatever integers stand for the classes; N at least 1."""
    # Micro averages look at no number of classes but for true negatives, which nobody asks for.
    counts = multiclass_stat_scores(predicted, labels, num_classes=1, average="micro", validate_args=False)
    return int(counts[0])


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of predicted classes (N,) that are the labels (N,), in [0, 1]; N at least 1."""
    return right_answers(predicted, labels) / len(labels)
