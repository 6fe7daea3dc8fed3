"""Frozen features or feature maps of a whole split."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from heatssl.backbones import evaluation_mode, feature_map
from heatssl.config import DataConfig
from heatssl.data import BadFiles, Batch, ImageData, eval_loader, normalise
from heatssl.errors import UserError
from heatssl.evaluation.readout import FINAL, Readout, read
from heatssl.progress_bar import progress_bar

MOST_BYTES = 4 * 2**30  # of memory for the maps of one split


def extract_features(
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = True,
    rank: int = 0,
    world: int = 1,
    readouts: Sequence[Readout] = (FINAL,),
) -> tuple[Tensor, Tensor]:
    """Features of every readable image, in order, resized and centre-cropped; mean-pooled unless told otherwise.

    Args:
        backbone: moved to ``device``; runs in evaluation mode, and its modes are restored.
        data: one split, see :func:`heatssl.data.open_split`.
        config: image size, normalisation, workers and the tolerated share of unreadable files.
        batch_size: images per forward pass; changes nothing but speed, memory, and rounding.
        device: where the backbone runs.
        progress: show a bar on a terminal once the work has taken two seconds.
        rank: of this process, which extracts its share alone; the shares in the order of ranks are the whole, bit for
            bit. Each share has to stay below the tolerated share of unreadable files.
        world: number of processes.
        readouts: where they are read, see :func:`heatssl.evaluation.readout.read`; those of several lie side by side.

    Returns:
        features (N, C) float32 and labels (N,) long, both on the CPU.

    Raises:
        UserError: when too many files cannot be read, or none can, or features are not finite: the images are named.
    """
    loader = eval_loader(data, config, batch_size=batch_size, rank=rank, world=world)

    def forward(backbone: nn.Module, images: Tensor) -> Tensor:
        return torch.cat(read(backbone, images, readouts), dim=1)

    return _each_batch(_Table(torch.float32), forward, backbone, data, config, loader, device, progress)


def extract_maps(
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    *,
    batch_size: int = 256,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Final feature maps of every readable image; arguments are those of :func:`extract_features`.

    Returns:
        maps (N, C, h, w) float16 and labels (N,) long, both on the CPU.

    Raises:
        UserError: as :func:`extract_features`, or when the maps would take more than ``MOST_BYTES``.
    """
    loader = eval_loader(data, config, batch_size=batch_size)
    table = _Table(torch.float16, MOST_BYTES)
    return _each_batch(table, feature_map, backbone, data, config, loader, device, progress)


class _Table:
    """Rows (N, ...), in memory that is taken once: joining a list of them in the end would take it twice."""

    def __init__(self, dtype: torch.dtype, most_bytes: int | None = None) -> None:
        self.dtype = dtype
        self.most_bytes = most_bytes
        self._rows = torch.empty(0, dtype=dtype)
        self._filled = 0

    def add(self, rows: Tensor, count: int) -> Tensor:
        """Which of the rows (B, ...) are finite, (B,); of ``count`` rows that may come."""
        if not self._filled:
            self._rows = self._room(count, rows.shape[1:])
        here = self._rows[self._filled : self._filled + len(rows)]
        here.copy_(rows)
        self._filled += len(rows)
        return torch.isfinite(here.flatten(1)).all(dim=1)

    def rows(self) -> Tensor:
        """All that were added; of no larger storage, which a file would hold as well."""
        return self._rows if self._filled == len(self._rows) else self._rows[: self._filled].clone()

    def _room(self, count: int, shape: torch.Size) -> Tensor:
        needed = self.dtype.itemsize * count * shape.numel()
        if self.most_bytes is not None and needed > self.most_bytes:
            raise UserError(
                f"the feature maps of {count} images, {' x '.join(map(str, shape))} each, would take "
                f"{needed / 1e9:.1f} GB of memory, more than {self.most_bytes / 1e9:.1f}: "
                "use fewer images (data.train_size, data.val_size), or what needs no maps, such as probe head=linear"
            )
        with torch.inference_mode(False):  # callers may train on what they get
            return torch.empty(count, *shape, dtype=self.dtype)


def extract_all_maps(backbone: nn.Module, data: ImageData, config: DataConfig, **settings: Any) -> Tensor:
    """Maps (N, C, h, w) float16 as of :func:`extract_maps`, of images none of which may be missing.

    Raises:
        UserError: see there, and when an image cannot be read: what belongs to it would be another's.
    """
    maps, _ = extract_maps(backbone, data, config, **settings)
    if len(maps) != len(data):
        raise UserError(
            f"{len(data) - len(maps)} images cannot be read: repair them, or take them and what belongs to them out"
        )
    return maps


def _each_batch(
    table: _Table,
    forward: Callable[[nn.Module, Tensor], Tensor],
    backbone: nn.Module,
    data: ImageData,
    config: DataConfig,
    loader: "DataLoader[Batch]",
    device: torch.device | str,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    """What ``forward`` makes of every readable, normalised image (B, 3, H, W), and their labels (N,)."""
    backbone.to(device)
    bad = BadFiles(config.bad_fraction)
    labels, broken = [torch.empty(0, dtype=torch.long)], []
    with evaluation_mode(backbone), torch.inference_mode():
        for batch in progress_bar(loader, name="features", unit="batch", shown=progress):
            bad.update(batch)
            if len(batch.images):
                found = forward(backbone, normalise(batch.images.to(device, non_blocking=True), config))
                finite = table.add(found, len(data))
                broken += [data.name(int(i)) for i in batch.indices[~finite]]
                labels.append(batch.labels)
    bad.check()
    if broken:
        more = f", {broken[0]} first" if len(broken) > 1 else f": {broken[0]}"
        fix = (
            "use an earlier checkpoint, or take these images out"
            if len(broken) < len(data)
            else "the weights are broken, use an earlier checkpoint"
        )
        raise UserError(f"features of {len(broken)} of {len(data)} images are NaN or infinite{more}: {fix}")
    if len(labels) == 1 and len(loader):
        raise UserError(f"none of the {len(data)} images can be read: check data.root={config.root}")
    with torch.inference_mode(False):
        return table.rows(), torch.cat(labels)
