"""The linear probe that most papers report: stochastic gradient descent, a grid of learning rates in one pass."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.evaluation.linear import ROWS, LinearProbe, moments
from heatssl.progress_bar import progress_bar
from heatssl.schedule import warmup_cosine

LEARNING_RATES = tuple(10 ** (k / 3 - 3) for k in range(13))  # 0.001 to 10, three to a decade
BATCH = 256
MOMENTUM = 0.9


@torch.no_grad()
def gradient_descent(
    x: Tensor,
    y: Tensor,
    learning_rates: Sequence[float],
    classes: int,
    epochs: int,
    seed: int,
    *,
    progress: bool = False,
) -> list[LinearProbe]:
    """One probe per learning rate, trained together on the same batches of features (N, C), labels (N,).

    Standardised features (MAE's BatchNorm without affine, arXiv 2111.06377, A.1), batches of 256, momentum 0.9,
    cosine decay to zero, no weight decay, zero start; a learning rate is that of a batch, not rescaled. Channels
    that vary together converge slowly, so a short run understates features of low effective rank, where
    :func:`heatssl.evaluation.logistic.logistic_regression` does not.
    ``progress`` shows a bar on a terminal.
    """
    mean, std = moments(x)
    inputs = torch.cat([F.pad((rows.float() - mean) / std, (0, 1), value=1.0) for rows in x.split(ROWS)])
    rates = torch.tensor(learning_rates, device=x.device).repeat_interleave(classes)  # one per column of the heads
    heads = torch.zeros(inputs.shape[1], len(rates), device=x.device)  # (C + 1, G K), the last row is the bias
    velocity = torch.zeros_like(heads)
    generator = torch.Generator().manual_seed(seed)
    steps, step = epochs * math.ceil(len(x) / BATCH), 0
    for _ in progress_bar(range(epochs), name="SGD", unit="epoch", shown=progress):
        for rows in torch.randperm(len(x), generator=generator).to(x.device).split(BATCH):
            error = (inputs[rows] @ heads).unflatten(1, (-1, classes)).softmax(dim=2)
            error -= F.one_hot(y[rows], classes)[:, None]
            velocity.mul_(MOMENTUM).addmm_(inputs[rows].T, error.flatten(1), alpha=1 / len(rows))
            heads -= warmup_cosine(step, 0, steps) * rates * velocity
            step += 1
    columns = heads.T.unflatten(0, (-1, classes))  # (G, K, C + 1)
    return [LinearProbe(head[:, :-1].contiguous(), head[:, -1].clone(), mean, std) for head in columns]
