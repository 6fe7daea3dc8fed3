"""What every pretraining objective offers to the training loop: a loss, its health, and maps to look at."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from heatssl.objectives.extrapolation import Extrapolation


class Outputs(NamedTuple):
    """One forward pass of an objective."""

    loss: Tensor  # scalar, to be minimised
    logs: dict[str, Tensor]  # detached scalars, cheap enough for every step
    field: Tensor  # (B, C, h, w), detached: the features behind the loss, as encoded; scattered ones (B, C, n, 1)


class Story(NamedTuple):
    """What a report says of an objective's maps."""

    heading: str
    explanation: str  # sentences
    captions: dict[str, str]  # of maps that are not called what others call them


class Objective(nn.Module):
    """Base of the objectives; each lives in a file of its own under ``heatssl/objectives``, found by its name.

    A subclass is constructed as ``Subclass(backbone, image_size, **settings)``; ``settings`` are the keys of
    ``configs/objective/<name>.yaml``.

    Attributes:
        crops: K random crops of each image in a batch, one after the other: row i K + k is crop k of image i.
        least_images: of a step, on all devices together, from which there is anything to learn.
        mean, std: of the colour channels, with which the images were normalised; ``objectives.create`` sets them,
            for objectives that change colours.
        story: of what :meth:`maps` shows.
    """

    backbone: nn.Module
    block: tuple[int, int] | None = None  # rows and columns, when the backbone sees one block of patches alone
    crops: int = 1
    least_images: int = 1
    mean: Sequence[float] = (0.485, 0.456, 0.406)
    std: Sequence[float] = (0.229, 0.224, 0.225)
    story: Story = Story("What is filled in", "The encoder saw only the visible part. What was hidden was painted.", {})

    def forward(self, images: Tensor) -> Outputs:
        """Normalised images (B, 3, S, S), B a multiple of ``crops`` -> loss, logs and the field behind them."""
        raise NotImplementedError

    def health(self, outputs: Outputs) -> dict[str, float]:
        """Figures that tell a collapsing or diverging run from a healthy one; costly, so only asked when logging.

        Features that are the same for all images can obey any law: ``health/rankme`` near 1 or ``health/channel_std``
        near 0 means collapse.
        """
        return {
            "health/rankme": rankme(outputs.field.mean(dim=(2, 3))).item(),
            "health/channel_std": channel_std(outputs.field).item(),
        }

    def maps(self, images: Tensor) -> dict[str, Tensor]:  # noqa: ARG002
        """What there is to look at, for normalised images (B, 3, S, S): those of these that the objective has.

        ``visible`` (B, 3, S, S) with the hidden part zeroed, ``visible_mask`` (B, S, S) bool,
        ``reconstruction`` (B, 3, S, S) normalised, ``from_rest`` (B, 3, S, S) likewise, painted from a mean alone,
        ``law_residual`` (B, h, w); ``first_view`` and ``second_view`` (B, 3, s, s) normalised, where views are
        compared. None: there is nothing to look at.
        """
        return {}

    def extrapolation(self, images: Tensor) -> Extrapolation | None:  # noqa: ARG002
        """What the law makes of one quarter of normalised images (B, 3, S, S); None where there is no law."""
        return None


def rankme(features: Tensor) -> Tensor:
    """Effective rank of a feature matrix (N, C): exp of the entropy of its singular values (RankMe, 2210.02885).

    Returns:
        scalar between 1 (all features on one line) and min(N, C).
    """
    singular_values = torch.linalg.svdvals(features.float())
    shares = singular_values / singular_values.sum().clamp_min(1e-12) + 1e-7  # eq. 1 of RankMe
    return torch.exp(-(shares * shares.log()).sum())


def channel_std(field: Tensor) -> Tensor:
    """Standard deviation of each channel over images and positions (B, C, h, w), mean over channels: scalar."""
    values = field.float().transpose(0, 1).flatten(1)
    return values.std(dim=1, correction=min(1, values.shape[1] - 1)).mean()  # of one value: 0
