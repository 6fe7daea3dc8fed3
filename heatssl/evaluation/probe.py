"""Linear probe: how well a linear classifier reads the classes from frozen features."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from heatssl.errors import UserError, check_choice
from heatssl.evaluation.checks import check_features, check_grid, check_labels
from heatssl.evaluation.gradient_descent import LEARNING_RATES, gradient_descent
from heatssl.evaluation.held_out import stratified_split
from heatssl.evaluation.linear import LinearProbe, accuracy_and_loss
from heatssl.evaluation.logistic import REGULARISATIONS, logistic_regression

SOLVERS = ("logistic_regression", "sgd")
SGD_EPOCHS = 30


@dataclass(frozen=True)
class ProbeResult:
    """What :func:`linear_probe` found."""

    accuracy: float  # on test, in [0, 1]
    held_out_accuracy: float | None  # of what was selected, on the part of train that selected it; None: no choice
    selected: float  # that point: a regularisation, or a learning rate
    probe: LinearProbe  # trained on the whole of train
    seconds: float
    reading: int = 0  # which of several features it reads


def linear_probe(
    train_x: Tensor | Sequence[Tensor],
    train_y: Tensor,
    test_x: Tensor | Sequence[Tensor],
    test_y: Tensor,
    *,
    solver: str = "logistic_regression",
    grid: Sequence[float] = (),
    iterations: int = 100,
    epochs: int = SGD_EPOCHS,
    held_out: float = 0.1,
    seed: int = 0,
    progress: bool = False,
) -> ProbeResult:
    """Select a point of the grid on a held-out part of train, retrain with it on the whole of train, test once.

    A single point leaves nothing to select, and is trained on the whole of train at once.

    The whole grid is trained in one pass, on each of several features of the same images: then the held-out part
    selects among them as well, as in DINOv2's evaluation (arXiv 2304.07193). The default solver,
    :func:`logistic_regression`, finds the best weights for each L2 strength, so the number says what the features
    hold and not how well they suit an optimiser; ``sgd``, :func:`gradient_descent`, is what most papers report: a
    grid of learning rates.

    Args:
        train_x: (N, C), any floating type, computed in float32; or several, such as of other layers.
        train_y: (N,) labels; the probe has ``train_y.max() + 1`` classes.
        test_x: (M, C), or as many; looked at once, after everything is chosen.
        test_y: (M,).
        solver: ``logistic_regression`` or ``sgd``.
        grid: L2 strengths or learning rates; empty for the solver's default.
        iterations: steps of ``logistic_regression``, in the selection and in the final training alike.
        epochs: of ``sgd``, likewise.
        held_out: share of each class that selects, at least one image of each class that has two.
        seed: of the split and of the order of batches; the result depends on nothing else.
        progress: show bars on a terminal once the work has taken two seconds.

    Raises:
        UserError: on shapes that do not fit, NaN features, negative labels, one class only, a label of test
            that train lacks, no class with two images, or settings outside their range.
    """
    start = time.perf_counter()
    check_probe_settings(solver, grid, iterations, epochs, held_out)
    train_views, test_views = (([x] if isinstance(x, Tensor) else list(x)) for x in (train_x, test_x))
    for train_view, test_view in zip(train_views, test_views, strict=True):
        check_features(train_view, train_y, test_view, test_y)
    train_y, test_y = train_y.long(), test_y.long()
    check_labels(train_y, test_y)
    classes = int(train_y.max()) + 1

    def train(x: Tensor, y: Tensor, points: Sequence[float]) -> list[LinearProbe]:
        if solver == "sgd":
            return gradient_descent(x, y, points, classes, epochs, seed, progress=progress)
        return logistic_regression(x, y, points, classes, iterations, progress=progress)

    points = tuple(grid) or (LEARNING_RATES if solver == "sgd" else REGULARISATIONS)
    reading, point, held_out_accuracy = 0, points[0], None
    if len(points) * len(train_views) > 1:
        fit, held = stratified_split(train_y, held_out, seed)
        scores = {}  # by features and point of the grid; of equals the first counts
        for place, x in enumerate(train_views):
            for each, candidate in zip(points, train(x[fit], train_y[fit], points), strict=True):
                accuracy, loss = accuracy_and_loss(candidate, x[held], train_y[held])
                scores[place, each] = (accuracy, -loss) if math.isfinite(loss) else (-1.0, -math.inf)
        reading, point = max(scores, key=scores.__getitem__)
        held_out_accuracy = scores[reading, point][0]
    (probe,) = train(train_views[reading], train_y, [point])
    accuracy, loss = accuracy_and_loss(probe, test_views[reading], test_y)
    if not math.isfinite(loss):
        raise UserError(f"the probe diverges at {point:g}, the best point of the grid: give a grid of smaller ones")
    return ProbeResult(accuracy, held_out_accuracy, point, probe, time.perf_counter() - start, reading)


def check_probe_settings(solver: str, grid: Sequence[float], iterations: int, epochs: int, held_out: float) -> None:
    """Settings of :func:`linear_probe`, before features cost time.

    Raises:
        UserError: on an unknown solver, or a setting outside its range.
    """
    check_choice("solver", solver, SOLVERS, UserError)
    check_grid(grid)
    if iterations < 1 or epochs < 1 or not 0 < held_out < 1:
        raise UserError("iterations and epochs must be at least 1, and held_out between 0 and 1")
