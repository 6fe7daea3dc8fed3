"""Whitened maps: uncorrelated and of one variance as far as they are not shrunk, whatever they were."""

import pytest
import torch

from heatssl.errors import UserError
from heatssl.evaluation.whitening import Whitening


def _rows(maps: torch.Tensor) -> torch.Tensor:
    """Channels (C, n) of all positions."""
    return maps.movedim(1, 0).flatten(1).double()


@pytest.fixture
def maps() -> torch.Tensor:
    """Six channels that are mixtures of strong and weak sources, 6,000 positions."""
    torch.manual_seed(0)
    mixture = torch.randn(6, 6) @ torch.diag(torch.tensor([9.0, 3, 1, 0.3, 0.1, 0.03]))
    return torch.einsum("dc,bchw->bdhw", mixture, torch.randn(400, 6, 3, 5)) + 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("shrinkage", [0.01, 0.5, 1.0])
def test_each_direction_ends_at_its_share(maps: torch.Tensor, dtype: torch.dtype, shrinkage: float) -> None:
    maps = maps.to(dtype)
    white = Whitening(maps, shrinkage)(maps)
    assert (white.shape, white.dtype) == (maps.shape, torch.float32)
    assert white.mean(dim=(0, 2, 3)).abs().max() < 1e-3
    strengths = torch.linalg.eigvalsh(torch.corrcoef(_rows(maps)))
    wanted = strengths / ((1 - shrinkage) * strengths + shrinkage)
    found = torch.linalg.eigvalsh(torch.cov(_rows(white), correction=0))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_shrunk_to_nothing_it_standardises(maps: torch.Tensor) -> None:
    std, mean = torch.std_mean(maps, dim=(0, 2, 3), keepdim=True, correction=0)
    torch.testing.assert_close(Whitening(maps, 1.0)(maps), (maps - mean) / std, rtol=1e-4, atol=1e-4)


def test_a_constant_channel_stays_quiet() -> None:
    maps = torch.randn(50, 3, 2, 2)
    maps[:, 1] = 7.0
    white = Whitening(maps, 0.01)(maps)
    assert white.isfinite().all()
    assert white[:, 1].abs().max() < 1e-2


def test_features_are_whitened_as_maps_of_one_position_are(maps: torch.Tensor) -> None:
    white = Whitening(maps[..., :1, :1], 0.1)
    torch.testing.assert_close(Whitening(maps[..., 0, 0], 0.1)(maps[..., 0, 0]), white(maps)[..., 0, 0])


@pytest.mark.parametrize("shrinkage", [0.0, 1.5])
def test_what_is_no_share_is_refused(maps: torch.Tensor, shrinkage: float) -> None:
    with pytest.raises(UserError, match="must be over 0, whitened, and at most 1, standardised"):
        Whitening(maps, shrinkage)
