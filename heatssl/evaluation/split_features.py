"""Features of a split, wherever they come from: memory, disk, or the backbone."""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from heatssl.backbones import evaluation_mode
from heatssl.data import ImageData, Split
from heatssl.evaluation import feature_cache, processes
from heatssl.evaluation.features import extract_features, extract_maps
from heatssl.evaluation.readout import FINAL, Readout, read
from heatssl.evaluation.results import device_name
from heatssl.evaluation.source import Source, digest_of, fingerprint

MAX_CACHED = 8  # splits whose features stay in memory: two weights, train and val, twice

_features: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()


def split_features(
    backbone: nn.Module, split: Split, source: Source, batch_size: int, readouts: Sequence[Readout] = (FINAL,)
) -> tuple[Tensor, Tensor]:
    """Features (N, C) float32 and labels (N,) of a split, extracted once, see :mod:`heatssl.evaluation.feature_cache`.

    Of several processes each extracts a share, and has the whole in the end, bit for bit that of one process.
    Features of several readouts lie side by side.
    """
    key = _features_key(backbone, split, source, batch_size, readouts)
    if key not in _features:
        found = feature_cache.load(key) if source.cache else None
        if not processes.everywhere(found is not None):
            found = extract_shared(backbone, source.splits[split], source, batch_size, readouts)
            # Images that have changed meanwhile belong to another key.
            if source.cache and processes.is_first() and source.digest_now(split) == source.digests[split]:
                feature_cache.keep(key, *found)
        assert found is not None
        _features[key] = found
        while len(_features) > MAX_CACHED:
            _features.popitem(last=False)
    return _features[key]


def split_readouts(
    backbone: nn.Module, split: Split, source: Source, batch_size: int, readouts: Sequence[Readout]
) -> tuple[list[Tensor], Tensor]:
    """The same with features (N, C) of each readout by itself: views of what is kept, not copies."""
    features, labels = split_features(backbone, split, source, batch_size, readouts)
    if len(readouts) == 1:
        return [features], labels
    sizes = widths(backbone.to(source.device), source.data.image_size, readouts)
    return list(features.split(sizes, dim=1)), labels


@torch.no_grad()
def widths(backbone: nn.Module, image_size: int, readouts: Sequence[Readout]) -> list[int]:
    """Channels of every readout, found by showing the backbone one empty image."""
    parameter = next(backbone.parameters())
    blank = torch.zeros(1, 3, image_size, image_size, device=parameter.device, dtype=parameter.dtype)
    with evaluation_mode(backbone):
        return [features.shape[1] for features in read(backbone, blank, readouts)]


def extract_shared(
    backbone: nn.Module,
    images: ImageData,
    source: Source,
    batch_size: int,
    readouts: Sequence[Readout] = (FINAL,),
) -> tuple[Tensor, Tensor]:
    """Features (N, C) and labels (N,) of any images, not kept; of several processes each extracts a share."""
    rank, world = processes.rank_and_world()
    features, labels = extract_features(
        backbone,
        images,
        source.data,
        batch_size=batch_size,
        device=source.device,
        progress=rank == 0,
        rank=rank,
        world=world,
        readouts=readouts,
    )
    return processes.gather(features), processes.gather(labels)


def _features_key(
    backbone: nn.Module, split: Split, source: Source, batch_size: int, readouts: Sequence[Readout]
) -> str:
    data = source.data
    return digest_of(
        fingerprint(backbone),
        source.info.describe(),  # heads of attention leave no trace in the weights
        source.digests[split],
        [data.image_size, data.mean, data.std, data.bad_fraction],
        batch_size,  # sums in another order differ in their last bits; likewise on other devices
        device_name(source.device),
        feature_cache.code(),
        list(readouts),
    )


def split_maps(backbone: nn.Module, split: Split, source: Source, batch_size: int) -> tuple[Tensor, Tensor]:
    """Feature maps (N, C, h, w) and labels (N,) of a split; not kept: large, and needed once by a command.

    Raises:
        UserError: when they would not fit into memory, see :func:`heatssl.evaluation.features.extract_maps`.
    """
    return extract_maps(backbone, source.splits[split], source.data, batch_size=batch_size, device=source.device)
