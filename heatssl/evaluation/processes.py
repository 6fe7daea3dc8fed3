"""Several processes that torchrun has started: each takes its share of the images, and all end with the same numbers.

Features are exchanged between the processors' memories, by gloo, whatever the device that has made them.
"""

import atexit
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

_PATIENCE = timedelta(days=1)  # one process may have slower files than the others
_joined: list[bool] = []


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else 1


def join() -> None:
    """Meet the others, where there are any; once is enough."""
    if launched() > 1 and not dist.is_initialized():
        dist.init_process_group("gloo", timeout=_PATIENCE)
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

    Shares are on the CPU and may differ in their number of rows; one without any row needs no other dimensions.
    """
    rank, world = rank_and_world()
    if world == 1:
        return share
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
    return whole


def total(values: Tensor) -> Tensor:
    """Sum of the values (...) of all processes, on every process."""
    if _joined:
        dist.all_reduce(values)
    return values


def everywhere(here: bool) -> bool:
    """Whether it is so on all processes."""
    return int(total(torch.tensor(int(here)))) == rank_and_world()[1]
