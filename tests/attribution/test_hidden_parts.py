"""Occlusion and RISE look at the score alone: held against captum, and against what they must find."""

from collections.abc import Callable

import pytest
import torch
from captum.attr import Occlusion
from torch import Tensor, nn

from heatssl.attribution import attribute
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


class Corner(nn.Module):
    """Logit 0 is the mean of the top left quarter."""

    num_classes = 1

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :, :16, :16].mean(dim=(1, 2, 3))[:, None]


def test_occlusion_equals_captum(small_cnn: Create, images: Tensor) -> None:
    model = small_cnn(num_classes=5)
    expected = Occlusion(model).attribute(
        images, (3, 8, 8), strides=(3, 8, 8), target=2, baselines=0, perturbations_per_eval=4
    )[:, 0]
    ours = attribute(model, images, "occlusion", 2, window=8, stride=8, normalize=False)
    torch.testing.assert_close(ours, expected.float(), rtol=1e-4, atol=1e-5)


def test_overlapping_squares_are_averaged_and_cover_every_pixel(images: Tensor) -> None:
    ones = torch.ones(1, 3, 32, 32)
    found = attribute(Corner(), ones, "occlusion", 0, window=10, stride=4, normalize=False)
    # A square wholly within the quarter takes 100 of its 256 pixels; one outside takes none.
    torch.testing.assert_close(found[0, 0, 0], torch.tensor(100 / 256))
    assert found[0, 31, 31] == 0
    assert torch.isfinite(found).all()
    with pytest.raises(UserError, match="stride"):
        attribute(Corner(), ones, "occlusion", 0, window=8, stride=9)


def test_rise_finds_what_the_score_sees() -> None:
    ones = torch.ones(1, 3, 32, 32)
    found = attribute(Corner(), ones, "rise", 0, samples=600, cells=4)
    inside, outside = found[0, :12, :12].mean(), found[0, 20:, 20:].mean()
    assert inside > 0.7
    assert outside < 0.3


def test_rise_of_a_constant_score_is_empty(images: Tensor) -> None:
    """The plain estimate would show the mean of the masks."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    model[1].weight.data.zero_()
    assert attribute(model, images, "rise", 1, samples=20, normalize=False).amax() < 1e-6
