"""What several processes know together, with gradients: sums over all of them, and all of their rows.

Lightning's DDP averages the gradients of the processes. The gradient of the whole is right when the losses of
the processes have the whole's loss as their mean, and when a collective hands every process its share of
everyone's gradient. ``torch.distributed.all_reduce`` does not: autograd knows nothing of it.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Number of processes that train together; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_processes(values: Tensor) -> Tensor:
    """Sum of equally shaped tensors, one from each process; the same on all of them, and differentiable."""
    return values if world_size() == 1 else _Sum.apply(values)


def share_of_batch(images: int, device: torch.device) -> float | Tensor:
    """What a mean over this process's images counts for: 1 where all have as many, as unreadable ones are left out."""
    if world_size() == 1:
        return 1.0
    total = torch.tensor(float(images), device=device)
    dist.all_reduce(total)
    return images * world_size() / total


def gather(rows: Tensor) -> tuple[Tensor, int]:
    """The rows of all processes, in the order of their ranks, differentiable.

    Args:
        rows: (n, D); n may differ between processes, as unreadable images are left out of a batch.

    Returns:
        all rows (N, D), and the place in it of this process's first.
    """
    if world_size() == 1:
        return rows, 0
    rank = dist.get_rank()
    counts = torch.zeros(world_size(), dtype=torch.long, device=rows.device)
    counts[rank] = len(rows)
    dist.all_reduce(counts)
    start, total = int(counts[:rank].sum()), int(counts.sum())
    # Everybody's rows at their places in a sum of zeros: unlike all_gather, it takes uneven numbers of rows.
    return sum_over_processes(torch.nn.functional.pad(rows, (0, 0, start, total - start - len(rows)))), start


class _Sum(torch.autograd.Function):
    """all_reduce; as every process's result depends on this one's values, so does its gradient: a sum again."""

    @staticmethod
    def forward(_: object, values: Tensor) -> Tensor:
        total = values.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: object, gradient: Tensor) -> Tensor:
        return sum_over_processes(gradient)
