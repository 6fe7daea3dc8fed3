"""Logistic regression solved on whole data, a grid of regularisations in one pass."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.evaluation.linear import ROWS, LinearProbe, moments
from heatssl.progress_bar import progress_bar

REGULARISATIONS = (1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 1e-1)
TOLERANCE = 1e-4  # of the largest entry of a gradient, as scikit-learn's
_MEMORY = 8  # steps that the shape of the loss is learned from
_DECREASE = 1e-4  # of what the slope promises, that a step must bring at least (Armijo)
_HALVINGS = 12


@torch.no_grad()
def logistic_regression(
    x: Tensor,
    y: Tensor,
    regularisations: Sequence[float],
    classes: int,
    iterations: int,
    *,
    progress: bool = False,
) -> list[LinearProbe]:
    """One probe per regularisation r, trained together on features (N, C), labels (N,) below ``classes``.

    Minimises mean cross-entropy + r / 2 |weight|^2 on standardised features; r of scikit-learn's
    ``LogisticRegression(C)`` on the same features is 1 / (C N). The problem is convex, so the result depends on
    no learning rate, batch size or order of batches. A probe is done when no entry of its gradient is over
    ``TOLERANCE``; the weakest regularisations may not be after the given iterations and are cut short like any
    early-stopped probe.

    L-BFGS (Nocedal and Wright, Numerical Optimization, algorithm 7.4) in the basis of principal components, where
    the Hessian at zero weights is diagonal: variance / K + r. From there the first step is Newton's. All probes that
    are not done share one pass over the data. ``progress`` shows a bar on a terminal.
    """
    mean, std = moments(x)
    inputs, basis, variance = _principal_components(x, mean, std)
    # The last column is the bias: its input is one, and it is not regularised.
    decay = F.pad(torch.tensor(regularisations, device=x.device)[:, None].expand(-1, x.shape[1]), (0, 1))[:, None]
    inverse = 1 / (F.pad(variance, (0, 1), value=1.0) / classes + decay)  # of the Hessian at zero: (G, 1, C + 1)
    heads = torch.zeros(len(regularisations), classes, x.shape[1] + 1, device=x.device)
    active = torch.arange(len(heads), device=x.device)  # the probes that are not done; all that follows is theirs
    at = heads.clone()
    loss, gradient = _loss_and_gradient(at, decay, inputs, y)
    steps: list[tuple[Tensor, Tensor]] = []  # what the heads, and their gradients, have changed by
    for _ in progress_bar(range(iterations), name="logistic regression", shown=progress):
        direction = -_times_inverse_hessian(gradient, steps, inverse)
        moved, moved_loss, moved_gradient = _search(at, direction, loss, gradient, decay, inputs, y)
        steps = [*steps, (moved - at, moved_gradient - gradient)][-_MEMORY:]
        at, loss, gradient = moved, moved_loss, moved_gradient
        heads[active] = at
        going = gradient.abs().amax(dim=(1, 2)) > TOLERANCE
        if not going.any():
            break
        if not going.all():
            active, at, loss, gradient = active[going], at[going], loss[going], gradient[going]
            decay, inverse = decay[going], inverse[going]
            steps = [(change[going], bend[going]) for change, bend in steps]
    return [LinearProbe(head[:, :-1] @ basis.T, head[:, -1].clone(), mean, std) for head in heads]


def _loss_and_gradient(heads: Tensor, decay: Tensor, inputs: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Loss (G,) and gradient (G, K, C + 1) of heads, in two products per chunk of rows."""
    gradient = torch.zeros_like(heads).flatten(0, 1)
    loss = 0.5 * (decay * heads.square()).sum(dim=(1, 2), dtype=torch.float64)
    for rows, labels in zip(inputs.split(ROWS), y.split(ROWS), strict=True):
        log_likelihood = (rows @ heads.flatten(0, 1).T).unflatten(1, heads.shape[:2]).log_softmax(dim=2)
        index = labels[:, None, None].expand(-1, len(heads), 1)
        loss -= log_likelihood.gather(2, index).sum(dim=(0, 2), dtype=torch.float64) / len(inputs)
        error = log_likelihood.exp_().scatter_add_(2, index, torch.full_like(index, -1.0, dtype=rows.dtype))
        gradient.addmm_(error.flatten(1).T, rows, alpha=1 / len(inputs))
    return loss, gradient.view_as(heads) + decay * heads


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """Of each probe: (G, K, C + 1) twice -> (G, 1, 1)."""
    return (a * b).sum(dim=(1, 2), keepdim=True)


def _times_inverse_hessian(gradient: Tensor, steps: list[tuple[Tensor, Tensor]], inverse: Tensor) -> Tensor:
    """The two loops of L-BFGS, from the diagonal ``inverse``, scaled as the last step says; all (G, K, C + 1)."""
    result, shares = gradient, []
    for change, bend in reversed(steps):
        curvature = _dot(change, bend)
        weight = torch.where(curvature > 0, 1 / curvature.clamp_min(1e-30), 0.0)
        share = weight * _dot(change, result)
        result = result - share * bend
        shares.append((share, weight))
    if steps:
        change, bend = steps[-1]
        scale = _dot(change, bend) / _dot(bend, inverse * bend).clamp_min(1e-30)
        result = torch.where(scale > 0, scale, 1.0) * inverse * result
    else:
        result = inverse * result
    for (change, bend), (share, weight) in zip(steps, reversed(shares), strict=True):
        result = result + change * (share - weight * _dot(bend, result))
    return result


def _search(
    heads: Tensor, direction: Tensor, loss: Tensor, gradient: Tensor, decay: Tensor, inputs: Tensor, y: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Heads, losses and gradients after steps that are halved, each on its own, until they bring enough.

    Where none does the numbers have no digits left: such a probe stays where it is, and counts as done.
    """
    slope = _dot(gradient, direction).flatten().double()
    moved, moved_loss, moved_gradient = heads.clone(), loss.clone(), torch.zeros_like(gradient)
    waiting = torch.arange(len(heads), device=heads.device)
    size = 1.0
    for _ in range(_HALVINGS):
        tried = heads[waiting] + size * direction[waiting]
        tried_loss, tried_gradient = _loss_and_gradient(tried, decay[waiting], inputs, y)
        enough = tried_loss <= loss[waiting] + _DECREASE * size * slope[waiting]
        done = waiting[enough]
        moved[done], moved_loss[done], moved_gradient[done] = tried[enough], tried_loss[enough], tried_gradient[enough]
        waiting = waiting[~enough]
        if not len(waiting):
            break
        size /= 2
    return moved, moved_loss, moved_gradient


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
