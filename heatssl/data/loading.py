"""Batches for training, without end and exactly repeatable, and for evaluation, in order.

What a training batch holds depends only on (seed, step, rank, world) and the data: a run that resumes at
step k meets the batches it would have met, whatever its number of workers.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from heatssl.config import DataConfig
from heatssl.data.batch import Batch
from heatssl.data.crop import centre_crop, check_crop_scale, random_resized_crop
from heatssl.data.image_data import ImageData, Subset
from heatssl.data.shapes import Shapes


def steps_per_epoch(data: ImageData, batch_size: int, world: int = 1) -> int:
    """Steps in which all processes together see the data once; the last, incomplete batch is left out."""
    return max(1, len(data) // (batch_size * world))


def train_loader(
    data: ImageData,
    config: DataConfig,
    *,
    batch_size: int,
    seed: int,
    crops: int = 1,
    start_step: int = 0,
    rank: int = 0,
    world: int = 1,
) -> "DataLoader[Batch]":
    """Endless shuffled batches of random-resized-crops.

    Args:
        data: what ``open_split`` returned.
        config: image size, crop scale and number of workers.
        batch_size: images per step and process. Data with fewer images than one step needs are repeated
            within the step, each time with another crop.
        seed: of order and crops, at least 0.
        crops: of each image, which is decoded once for all of them.
        start_step: number of the first batch.
        rank: of this process; within an epoch no two processes see the same image.
        world: number of processes.

    Returns:
        An iterable of ``Batch``; one is empty when none of its files can be read. Iterating it again
        starts at ``start_step`` again.

    Raises:
        UserError: when ``crop_scale`` is no range of fractions.
    """
    check_crop_scale(config.crop_scale)
    steps = _Steps(len(data), batch_size, seed, crops, start_step, rank, world)
    return _loader(_Views(data, config.image_size, config.crop_scale), steps, config.workers)


def eval_loader(
    data: ImageData, config: DataConfig, *, batch_size: int, rank: int = 0, world: int = 1
) -> "DataLoader[Batch]":
    """All images once, in order: the centre square, scaled to (S, S). The last batch may be smaller.

    Of ``world`` processes each gets a share of the batches: those of process 0 come first, and a batch holds what it
    would hold with a single process.
    """
    views = _Views(data, config.image_size, config.crop_scale)
    return _loader(views, _InOrder(len(data), batch_size, rank, world), config.workers)


class _View(NamedTuple):
    """One image to be shown: which, the seed of its crops, and their number; no seed: the centre, once."""

    image: int
    seed: tuple[int, ...] | None = None
    crops: int = 1


class _Steps(Sampler[list[_View]]):
    """The views of every step from ``start`` on, without end."""

    def __init__(self, images: int, batch_size: int, seed: int, crops: int, start: int, rank: int, world: int) -> None:
        self.images = images
        self.batch_size = batch_size
        self.seed = seed
        self.crops = crops
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[_View]]:
        together = self.batch_size * self.world
        per_epoch = max(1, self.images // together)
        current_epoch = -1
        for step in count(self.start):
            epoch, step_in_epoch = divmod(step, per_epoch)
            if epoch != current_epoch:
                current_epoch = epoch
                order = np.random.default_rng((self.seed, epoch)).permutation(self.images)
                order = np.resize(order, max(len(order), together))  # tiny data: round and round
            first = step_in_epoch * together + self.rank * self.batch_size
            chosen = order[first : first + self.batch_size].tolist()
            # An image's place in the whole batch: several processes show the very crops of one.
            places = enumerate(chosen, start=self.rank * self.batch_size)
            # The 0 says nothing, but without it recorded runs would draw other crops.
            yield [_View(index, (self.seed, step, 0, place), self.crops) for place, index in places]


class _InOrder(Sampler[list[_View]]):
    """Every image of this process's share of the batches, once."""

    def __init__(self, images: int, batch_size: int, rank: int, world: int) -> None:
        firsts = range(0, images, batch_size)
        self.images = images
        self.batch_size = batch_size
        self.firsts = firsts[rank * len(firsts) // world : (rank + 1) * len(firsts) // world]

    def __len__(self) -> int:
        return len(self.firsts)

    def __iter__(self) -> Iterator[list[_View]]:
        for first in self.firsts:
            yield [_View(index) for index in range(first, min(first + self.batch_size, self.images))]


class _Views(Dataset[Batch]):
    """Views of images, fetched a whole batch at a time so that a worker hands over one tensor."""

    def __init__(self, data: ImageData, image_size: int, crop_scale: Sequence[float]) -> None:
        self.data = data
        self.labels = np.asarray(data.labels)  # an array is shared with the workers, a list would be copied
        self.image_size = image_size
        self.crop_scale = crop_scale

    def __getitem__(self, view: _View) -> Batch:
        return self.__getitems__([view])

    def __getitems__(self, views: list[_View]) -> Batch:
        crops = views[0].crops
        images = torch.empty(len(views), crops, 3, self.image_size, self.image_size, dtype=torch.uint8)
        indices: list[int] = []
        bad: list[str] = []
        for view in views:
            try:
                self._show(view, out=images[len(indices)])
            except MemoryError:
                raise
            except Exception as error:  # noqa: BLE001 - decoders of damaged files raise nearly anything
                bad.append(f"{self.data.name(view.image)}: {_one_line(error)}")
            else:
                indices.append(view.image)
        labels = torch.as_tensor(self.labels[indices], dtype=torch.long)
        return Batch(images[: len(indices)].flatten(0, 1), labels, torch.tensor(indices, dtype=torch.long), bad)

    def _show(self, view: _View, out: Tensor) -> None:
        """Crops of one image, (K, 3, S, S)."""
        image = self.data.load(view.image)
        if view.seed is None:
            out[0] = centre_crop(image, self.image_size)
            return
        random = np.random.default_rng(view.seed)
        for crop in out:
            crop.copy_(random_resized_crop(image, self.image_size, self.crop_scale, random))


def _loader(views: _Views, batches: Sampler[list[_View]], workers: int) -> "DataLoader[Batch]":
    whole = views.data
    while isinstance(whole, Subset):
        whole = whole.data
    if isinstance(whole, Shapes):
        whole.paint_all()  # before the workers fork, or each would paint everything again
    workers = min(workers, available_cores())  # more only wait for each other, and torch warns of them
    return DataLoader(
        views,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=_as_it_is,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=_leave_stopping_to_the_run,
    )


def available_cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _leave_stopping_to_the_run(_: int) -> None:
    """Schedulers send SIGTERM to every process of a job: a worker that died of it would take the last step along."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _as_it_is(batch: Any) -> Any:
    return batch


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())
