"""The head between features and embeddings: linear layers with batch norm and ReLU between them."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from heatssl.objectives.processes import sum_over_processes, world_size
from heatssl.ops import full_precision


def embedding_head(widths: Sequence[int]) -> nn.Sequential:
    """Features to embeddings, (N, widths[0]) -> (N, widths[-1]): batch norm and ReLU after all but the last layer."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths[:-1]):
        layers += [nn.Linear(inputs, outputs, bias=False), BatchNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(widths[-2], widths[-1]))


class BatchNorm(nn.BatchNorm1d):
    """Batch norm (N, C) -> (N, C) over the rows of all processes.

    With the statistics of one process alone, the rows of a batch would tell which of them are together, a
    shortcut that SimCLR (2002.05709, section 2.2) closes in the same way. torch's SyncBatchNorm has no CPU path.
    """

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise, and in training move the running statistics."""
        if not self.training or world_size() == 1:
            return super().forward(rows)
        with full_precision(rows):
            values = rows.to(self.weight.dtype)
            ones = values.new_ones(1, self.num_features)
            count, total = sum_over_processes(torch.stack([len(rows) * ones[0], values.sum(dim=0)])).unbind()
            mean = total / count
            variance = sum_over_processes((values - mean).square().sum(dim=0)) / count
            with torch.no_grad():
                assert self.running_mean is not None
                assert self.running_var is not None
                assert self.num_batches_tracked is not None
                momentum = self.momentum or 0.0
                self.running_mean.lerp_(mean, momentum)
                self.running_var.lerp_(variance * count / (count - 1), momentum)
                self.num_batches_tracked += 1
            return (values - mean) * (variance + self.eps).rsqrt() * self.weight + self.bias
