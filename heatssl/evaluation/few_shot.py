"""Few labels: a linear probe of a handful of labelled images, over and over with other ones."""

from dataclasses import dataclass
from statistics import mean, stdev

import torch
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation.accuracy import accuracy
from heatssl.evaluation.checks import check_features, check_labels
from heatssl.evaluation.logistic import logistic_regression
from heatssl.progress_bar import progress_bar

DRAWS = 5
ITERATIONS = 200


@dataclass(frozen=True)
class FewShotResult:
    """What :func:`few_shot_probe` found."""

    accuracies: list[float]  # of each draw, on test, in [0, 1]

    @property
    def accuracy(self) -> float:
        """Their mean."""
        return mean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Their standard deviation; 0 for a single draw."""
        return stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0


def few_shot_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    shots: int | None = None,
    share: float | None = None,
    draws: int = DRAWS,
    seed: int = 0,
    progress: bool = False,
) -> FewShotResult:
    """Logistic regression on few labelled features; every draw takes others, and is tested on the whole of test.

    The strength of the L2 term is that of scikit-learn's default, C = 1: with one image of each class there is nothing
    to choose it on. Channels are standardised by the drawn features alone.

    Args:
        train_x: (N, C), any floating type.
        train_y: (N,) labels.
        test_x: (M, C).
        test_y: (M,).
        shots: images of each class; or
        share: of each class, in (0, 1), at least one image of each. One of the two is given.
        draws: how many times.
        seed: of the draws; the result depends on nothing else.
        progress: show a bar on a terminal once the work has taken two seconds.

    Raises:
        UserError: on features that :func:`linear_probe` refuses, settings out of their range, and a class with fewer
            images than ``shots``.
    """
    check_draws(train_y, shots, share, draws)
    check_features(train_x, train_y, test_x, test_y)
    train_y, test_y = train_y.long(), test_y.long()
    check_labels(train_y, test_y)
    classes = int(train_y.max()) + 1
    generator = torch.Generator().manual_seed(seed)
    accuracies = []
    for _ in progress_bar(range(draws), name="draws", shown=progress):
        rows = draw(train_y, shots, share, generator)
        x, y = train_x[rows], train_y[rows]
        (probe,) = logistic_regression(x, y, [1 / len(y)], classes, ITERATIONS)
        accuracies.append(accuracy(probe.logits(test_x).argmax(dim=1), test_y))
    return FewShotResult(accuracies)


def draw(labels: Tensor, shots: int | None, share: float | None, generator: torch.Generator) -> Tensor:
    """Rows of so many images of each class, or of such a share of them, at random."""
    chosen = []
    for label in labels.unique():
        rows = (labels == label).nonzero().flatten()
        number = shots if shots is not None else max(1, round((share or 0) * len(rows)))
        chosen.append(rows[torch.randperm(len(rows), generator=generator)[:number].to(rows.device)])
    return torch.cat(chosen)


def check_draws(labels: Tensor, shots: int | None, share: float | None, draws: int) -> None:
    """Settings of :func:`few_shot_probe` and labels (N,) of train, before features cost time.

    Raises:
        UserError: on settings out of their range, and a class with fewer images than ``shots``.
    """
    if (shots is None) == (share is None):
        raise UserError("give shots=N, images of each class, or share=F, a fraction of train, and not both")
    if (shots is not None and shots < 1) or (share is not None and not 0 < share < 1) or draws < 1:
        raise UserError("shots and draws must be at least 1, and share between 0 and 1")
    sizes = torch.bincount(labels)
    fewest = int(sizes[sizes > 0].min())
    if shots is not None and shots > fewest:
        raise UserError(f"shots={shots}, but a class has only {fewest} images: set shots to at most {fewest}")
