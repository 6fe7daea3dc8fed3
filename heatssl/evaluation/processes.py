"""Several processes that torchrun has started: each takes its share of the images, and all end with the same numbers.

Features are exchanged between the processors' memories, by gloo, whatever the device that has made them; gradients
between the devices.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

_PATIENCE = timedelta(days=1)  # one process may have slower files than the others
# Not empty once join() has met the others. A group that Lightning has made does not count: within it online kNN runs
# on one process alone, and an exchange would wait for ever.
_joined: list[bool] = []


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join() -> None:
    """Meet the others, where there are any; once is enough."""
    if launched() > 1 and not dist.is_initialized():
        backends = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backends, timeout=_PATIENCE)
        atexit.register(dist.destroy_process_group)
        _joined.append(True)


def rank_and_world() -> tuple[int, int]:
    """Number of this process, and how many there are: (0, 1) before :func:`join`."""
    return (dist.get_rank(), dist.get_world_size()) if _joined else (0, 1)


def is_first() -> bool:
    """Whether this process is the one that speaks and writes."""
    return rank_and_world()[0] == 0


def gather(share: Tensor) -> Tensor:
    """Shares (n_r, ...) of all processes, one below the other in the order of ranks, on every process.

    Shares may differ in their number of rows; one without any row needs no other dimensions.
    """
    rank, world = rank_and_world()
    if world == 1:
        return share
    device, share = share.device, share.cpu()
    shapes: list[torch.Size] = [share.shape] * world
    dist.all_gather_object(shapes, share.shape)
    rows = [shape[0] for shape in shapes]
    width = next((shape[1:] for shape in shapes if shape[0]), share.shape[1:])
    whole = torch.empty(sum(rows), *width, dtype=share.dtype)
    for source, part in enumerate(whole.split(rows)):
        if source == rank and len(part):
            part.copy_(share)
        if len(part):
            dist.broadcast(part, src=source)
    return whole.to(device)


def total(values: Tensor) -> Tensor:
    """Sum of the values (...) of all processes, on every process."""
    if _joined:
        dist.all_reduce(values)
    return values


def everywhere(here: bool) -> bool:
    """Whether it is so on all processes."""
    return int(total(torch.tensor(int(here)))) == rank_and_world()[1]


def parallel(model: nn.Module) -> nn.Module:
    """The model with gradients that are the mean over all processes; it has the weights of the first."""
    # A static graph may have weights that no output hangs on, such as a pooling layer that nobody asks.
    return DistributedDataParallel(model, static_graph=True) if _joined else model
