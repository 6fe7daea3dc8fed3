"""Logistic regression solved on whole data, a grid of regularisations in one pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.evaluation.linear import ROWS, LinearProbe, moments

REGULARISATIONS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)


@torch.no_grad()
def logistic_regression(
    x: Tensor, y: Tensor, regularisations: Sequence[float], classes: int, iterations: int
) -> list[LinearProbe]:
    """One probe per regularisation r, trained together on features (N, C), labels (N,) below ``classes``.

    Minimises mean cross-entropy + r / 2 |weight|^2 on standardised features; r of scikit-learn's
    ``LogisticRegression(C)`` on the same features is 1 / (C N). The problem is convex, so the result depends on
    no learning rate, batch size or order of batches. The weakest regularisations may not have converged after
    the given iterations and are cut short like any early-stopped probe.

    Bohning's bound (1992, "Multinomial logistic regression algorithm", eq. 2.5): the Hessian is at most half
    the covariance of the inputs, for any weights. In the basis of principal components that bound is
    diagonal, so dividing each gradient by it is a step that needs no line search; Nesterov's momentum with
    restart (O'Donoghue and Candes, arXiv 1204.3982) makes it fast.
    """
    mean, std = moments(x)
    inputs, basis, variance = _principal_components(x, mean, std)
    # The last column is the bias: its input is one, and it is not regularised.
    decay = F.pad(torch.tensor(regularisations, device=x.device)[:, None].expand(-1, x.shape[1]), (0, 1))
    step = 1 / (0.5 * F.pad(variance, (0, 1), value=1.0) + decay)
    heads = torch.zeros(len(regularisations), classes, x.shape[1] + 1, device=x.device)
    ahead, momentum = heads.clone(), torch.ones(len(regularisations), 1, 1, device=x.device)
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
