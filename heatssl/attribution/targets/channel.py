"""One channel of the embedding: what a single feature looks at."""

import torch
from torch import Tensor, nn

from heatssl.attribution.targets.target import Target, TargetMaker, embed
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe


class Channel:
    """The value of one channel, mean over positions."""

    uses_classifier = False

    def __init__(self, model: nn.Module, index: int) -> None:
        self.model = model
        self.index = index

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:  # noqa: ARG002
        return embed(self.model, points)[:, self.index].float()


def channel(index: int) -> TargetMaker:
    """:class:`Channel` number ``index``, from 0 on."""

    def make(model: nn.Module, images: Tensor, probe: LinearProbe | None) -> Target:  # noqa: ARG001
        with torch.no_grad():
            channels = embed(model, images[:1]).shape[1]
        if not 0 <= index < channels:
            raise UserError(f"there is no channel {index}: choose one from 0 to {channels - 1}")
        return Channel(model, index)

    return make
