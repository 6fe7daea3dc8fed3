"""Linear probe: logistic regression on frozen features, a grid of regularisations in one pass."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import safetensors
import safetensors.torch
import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.errors import UserError
from heatssl.evaluation.checks import check_features
from heatssl.export import disk_errors, write_atomically

REGULARISATIONS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
ROWS = 8192  # features whose logits are in memory at a time


@dataclass(frozen=True)
class LinearProbe:
    """A linear classifier of standardised features."""

    weight: Tensor  # (K, C)
    bias: Tensor  # (K,)
    mean: Tensor  # (C,) of the training features
    std: Tensor  # (C,)

    def logits(self, x: Tensor) -> Tensor:
        """Features (N, C) -> logits (N, K); differentiable in the features."""
        probe = self.to(x.device)
        return F.linear((x.to(probe.mean.dtype) - probe.mean) / probe.std, probe.weight, probe.bias)

    def to(self, device: torch.device | str) -> "LinearProbe":
        """The same probe on another device."""
        return LinearProbe(*(tensor.to(device) for tensor in (self.weight, self.bias, self.mean, self.std)))


@dataclass(frozen=True)
class ProbeResult:
    """What :func:`linear_probe` found."""

    accuracy: float  # on test, in [0, 1]
    held_out_accuracy: float  # of the selected regularisation, on the part of train that selected it
    regularisation: float
    probe: LinearProbe  # trained on the whole of train
    seconds: float


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    seed: int = 0,
    iterations: int = 100,
    regularisations: Sequence[float] = (),
    held_out: float = 0.1,
) -> ProbeResult:
    """Select a regularisation on a held-out part of train, retrain with it on the whole of train, test once.

    Minimises mean cross-entropy + r / 2 |weight|^2 on features standardised by what is trained on; r of
    scikit-learn's ``LogisticRegression(C)`` on the same features is 1 / (C N). The problem is convex and
    solved on whole data, so there is no learning rate, batch size or order of batches that the number could
    depend on.

    Args:
        train_x: (N, C), any floating type; computed in float32.
        train_y: (N,) labels; the probe has ``train_y.max() + 1`` classes.
        test_x: (M, C), looked at once, after everything is chosen.
        test_y: (M,).
        seed: of the split; the result depends on nothing else.
        iterations: steps of the solver, in the selection and in the final training alike. The weakest
            regularisations may not have converged by then and are cut short like any early-stopped probe.
        regularisations: the grid; empty for the default one, 1e-6 to 1e-1.
        held_out: share of each class that selects, at least one image of each class that has two.

    Raises:
        UserError: on shapes that do not fit, NaN features, negative labels, one class only, a label of test
            that train lacks, no class with two images, or settings outside their range.
    """
    start = time.perf_counter()
    check_features(train_x, train_y, test_x, test_y)
    _check_labels(train_y, test_y)
    grid = tuple(regularisations) or REGULARISATIONS
    if min(grid) <= 0 or iterations < 1 or not 0 < held_out < 1:
        raise UserError("regularisations must be positive, iterations at least 1 and held_out between 0 and 1")
    classes = int(train_y.max()) + 1
    fit, held = _stratified_split(train_y, held_out, seed)

    scores = []
    for candidate in _train(train_x[fit], train_y[fit], grid, classes, iterations):
        accuracy, loss = _evaluate(candidate, train_x[held], train_y[held])
        scores.append((accuracy, -loss))
    best = max(range(len(grid)), key=scores.__getitem__)
    (probe,) = _train(train_x, train_y, grid[best : best + 1], classes, iterations)
    accuracy, _ = _evaluate(probe, test_x, test_y)
    return ProbeResult(accuracy, scores[best][0], grid[best], probe, time.perf_counter() - start)


@torch.no_grad()
def _train(x: Tensor, y: Tensor, grid: Sequence[float], classes: int, iterations: int) -> list[LinearProbe]:
    """One probe per regularisation, trained together on features (N, C).

    Bohning's bound (1992, "Multinomial logistic regression algorithm", eq. 2.5): the Hessian is at most half
    the covariance of the inputs, for any weights. In the basis of principal components that bound is
    diagonal, so dividing each gradient by it is a step that needs no line search; Nesterov's momentum with
    restart (O'Donoghue and Candes, arXiv 1204.3982) makes it fast.
    """
    mean, std = _moments(x)
    inputs, basis, variance = _principal_components(x, mean, std)
    # The last column is the bias: its input is one, and it is not regularised.
    decay = F.pad(torch.tensor(grid, device=x.device)[:, None].expand(-1, x.shape[1]), (0, 1))
    step = 1 / (0.5 * F.pad(variance, (0, 1), value=1.0) + decay)
    heads = torch.zeros(len(grid), classes, x.shape[1] + 1, device=x.device)
    ahead, momentum = heads.clone(), torch.ones(len(grid), 1, 1, device=x.device)
    for _ in range(iterations):
        gradient = _gradient(ahead, inputs, y) + decay[:, None] * ahead
        moved = ahead - step[:, None] * gradient
        uphill = (gradient * (moved - heads)).sum(dim=(1, 2), keepdim=True) > 0
        momentum = torch.where(uphill, 1.0, momentum)
        faster = (1 + (1 + 4 * momentum.square()).sqrt()) / 2
        ahead = moved + (momentum - 1) / faster * (moved - heads)
        heads, momentum = moved, faster
    return [LinearProbe(head[:, :-1] @ basis.T, head[:, -1].clone(), mean, std) for head in heads]


def _gradient(heads: Tensor, inputs: Tensor, y: Tensor) -> Tensor:
    """Gradient of the mean cross-entropy by heads (G, K, C + 1), all in two products per chunk of rows."""
    gradient = torch.zeros_like(heads).flatten(0, 1)
    for rows, labels in zip(inputs.split(ROWS), y.split(ROWS), strict=True):
        error = (rows @ heads.flatten(0, 1).T).unflatten(1, heads.shape[:2]).softmax(dim=2)
        error -= F.one_hot(labels, heads.shape[1])[:, None]
        gradient.addmm_(error.flatten(1).T, rows, alpha=1 / len(inputs))
    return gradient.view_as(heads)


def _principal_components(x: Tensor, mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised features in their own basis, with a one (N, C + 1); the basis (C, C), variances (C,)."""
    covariance = torch.zeros(x.shape[1], x.shape[1], dtype=torch.float64, device=x.device)
    for rows in x.split(ROWS):
        standard = (rows.float() - mean) / std
        covariance += standard.T @ standard
    variance, basis = torch.linalg.eigh(covariance / len(x))
    # A larger bound is still a bound, and keeps rounding noise in empty directions from being blown up.
    variance = variance.clamp_min(1e-6 * float(variance[-1])).float()
    basis = basis.float()
    inputs = torch.cat([F.pad(((rows.float() - mean) / std) @ basis, (0, 1), value=1.0) for rows in x.split(ROWS)])
    return inputs, basis, variance


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and deviation per channel, in float64 and by chunks; a constant channel gets deviation one."""
    mean = torch.stack([rows.double().sum(dim=0) for rows in x.split(ROWS)]).sum(dim=0) / len(x)
    squares = torch.stack([(rows.double() - mean).square().sum(dim=0) for rows in x.split(ROWS)])
    std = (squares.sum(dim=0) / len(x)).sqrt()
    # Rounding noise of a constant channel must not be blown up to unit size.
    std = torch.where(std > 1e-6 * (mean.abs() + std.mean()), std, 1.0)
    return mean.float(), std.float()


def _stratified_split(y: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Rows to fit and rows held out: the share of each class, at least one where the class has two."""
    generator = torch.Generator().manual_seed(seed)
    fit, held = [], []
    for label in y.unique():
        rows = (y == label).nonzero().flatten()
        rows = rows[torch.randperm(len(rows), generator=generator).to(rows.device)]
        count = min(max(1, round(share * len(rows))), len(rows) - 1)
        held.append(rows[:count])
        fit.append(rows[count:])
    if sum(len(rows) for rows in held) == 0:
        raise UserError("every class has a single training image, none can be held out: give at least two per class")
    return torch.cat(fit), torch.cat(held)


def _check_labels(train_y: Tensor, test_y: Tensor) -> None:
    present = train_y.unique()
    if present[0] < 0 or test_y.min() < 0:
        raise UserError("labels must not be negative: number the classes from 0")
    if len(present) < 2:
        raise UserError(f"all training images have label {int(present[0])}: a probe needs at least two classes")
    unknown = test_y[~torch.isin(test_y, present)].unique()
    if len(unknown):
        raise UserError(f"test has labels that train lacks: {unknown.tolist()[:10]}: use the same classes in both")


@torch.no_grad()
def _evaluate(probe: LinearProbe, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Accuracy and mean cross-entropy."""
    logits = torch.cat([probe.logits(rows) for rows in x.split(ROWS)])
    return (logits.argmax(dim=1) == y).double().mean().item(), F.cross_entropy(logits, y).item()


# ---- the probe as a file


def save_probe(path: Path, probe: LinearProbe, classes: list[str], weights: str = "") -> None:
    """Write weight, bias, mean and std, whole or not at all.

    Args:
        path: ``probe.safetensors``.
        probe: moved to the CPU for the file.
        classes: names of the classes (metadata ``classes``, JSON).
        weights: fingerprint of the backbone whose features the probe reads (metadata ``weights``).
    """
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    tensors = {name: getattr(probe, name).cpu().contiguous() for name in ("weight", "bias", "mean", "std")}
    content = safetensors.torch.save(tensors, metadata={"classes": json.dumps(classes), "weights": weights})
    write_atomically(path, lambda file: file.write(content))


def load_probe(path: Path, weights: str = "") -> tuple[LinearProbe, list[str]]:
    """The probe and its classes' names.

    Args:
        path: what :func:`save_probe` wrote.
        weights: fingerprint of the backbone that it will be used with; empty: no check.

    Raises:
        UserError: when the file is missing or damaged, or belongs to other weights.
    """
    command = f"`heatssl probe run={path.parent}`"
    if not path.exists():
        raise UserError(f"{path} does not exist: run {command} first")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            classes = json.loads(metadata["classes"])
            probe = LinearProbe(*(file.get_tensor(name) for name in ("weight", "bias", "mean", "std")))
    except (safetensors.SafetensorError, KeyError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): run {command} again") from error
    if weights and metadata.get("weights") != weights:
        raise UserError(f"{path} was trained on other weights, those of an earlier or later step: run {command} again")
    return probe, classes
