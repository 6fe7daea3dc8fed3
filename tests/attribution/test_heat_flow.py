"""Heat flow has closed forms; broken ones would still give smooth maps."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from heatssl.attribution import attribute
from heatssl.attribution.heat_graph import affinity, steady_state
from heatssl.backbones import feature_map
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


@pytest.fixture
def weights() -> Tensor:
    """Affinities of two random fields on a 4 x 5 grid."""
    return affinity(torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(0)), 2.0, 4.0)


def test_affinity_is_the_sharpened_cosine_and_more_beside_each_other(weights: Tensor) -> None:
    field = torch.randn(2, 8, 4, 5, generator=torch.Generator().manual_seed(0))
    centred = field - field.mean(dim=(2, 3), keepdim=True)
    for (row, column), near in {(0, 1): 5.0, (0, 2): 1.0, (1, 0): 5.0, (1, 1): 1.0}.items():
        cosine = torch.cosine_similarity(centred[..., 0, 0], centred[..., row, column]).clamp_min(0)
        torch.testing.assert_close(weights[:, 0, 5 * row + column], near * cosine**2)
    assert torch.equal(weights, weights.mT)
    assert weights.diagonal(dim1=1, dim2=2).abs().max() == 0


def test_rest_is_where_the_heat_equation_stands_still(weights: Tensor) -> None:
    """du/dt = s - u - lambda (I - D^-1 W + b E) u = 0, E counting the sides that touch the border of the image."""
    source = torch.rand(2, 4, 5)
    rested = steady_state(source, weights, 30.0, 0.2).flatten(1)
    walk = weights / weights.sum(dim=2, keepdim=True)
    sides = torch.tensor([2, 1, 1, 1, 2, 1, 0, 0, 0, 1, 1, 0, 0, 0, 1, 2, 1, 1, 1, 2])
    flow = source.flatten(1) - rested - 30 * (rested - (walk @ rested[..., None])[..., 0] + 0.2 * sides * rested)
    assert flow.abs().max() < 1e-4


def test_insulated_heat_is_conserved_stays_within_its_range_and_a_constant_stays(weights: Tensor) -> None:
    source = torch.rand(2, 4, 5)
    rested = steady_state(source, weights, 64.0, 0.0)
    degree = weights.sum(dim=2)
    heat, given = ((degree * state.flatten(1)).sum(dim=1) for state in (rested, source))
    torch.testing.assert_close(heat, given, rtol=1e-4, atol=0)
    assert (rested.amax(dim=(1, 2)) <= source.amax(dim=(1, 2))).all()
    assert (rested.amin(dim=(1, 2)) >= source.amin(dim=(1, 2))).all()
    torch.testing.assert_close(steady_state(torch.full((2, 4, 5), 0.3), weights, 64.0, 0.0), torch.full((2, 4, 5), 0.3))
    torch.testing.assert_close(steady_state(source, weights, 0.0, 0.1), source)


def test_heat_stays_within_what_hangs_together() -> None:
    """Two objects whose features have nothing in common: a spot in one fills that one, and not the other."""
    field = torch.zeros(1, 2, 2, 6)
    field[:, 0, :, :3], field[:, 1, :, 3:] = 1, 1
    source = torch.zeros(1, 2, 6)
    source[0, 0, 0] = 1
    rested = steady_state(source, affinity(field, 4.0, 8.0), 1e5, 0.0)
    assert rested[..., 3:].abs().max() == 0
    assert (rested[..., :3].amax() - rested[..., :3].amin()) < 1e-3 * rested.amax()


def test_a_position_like_no_other_keeps_its_heat() -> None:
    weights = torch.zeros(1, 4, 4)
    weights[0, 0, 1] = weights[0, 1, 0] = 1.0
    source = torch.tensor([[[0.0, 1.0], [0.5, 0.25]]])
    rested = steady_state(source, weights, 1e3, 0.0)
    torch.testing.assert_close(rested[0, 1], source[0, 1])
    torch.testing.assert_close(rested[0, 0], torch.tensor([0.5, 0.5]), atol=1e-3, rtol=0)


def test_an_object_keeps_the_heat_that_background_loses_at_the_border() -> None:
    """Without a target: an object off the centre is warmer than all background, however near the middle that is."""
    field = torch.zeros(1, 2, 9, 9)
    field[:, 0], field[:, 0, 1:4, 5:8], field[:, 1, 1:4, 5:8] = 1, 0, 1
    warm = steady_state(torch.ones(1, 9, 9), affinity(field, 2.0, 8.0), 64.0, 0.1)[0]
    inside = torch.zeros(9, 9, dtype=torch.bool)
    inside[1:4, 5:8] = True
    assert warm[inside].min() > warm[~inside].max()
    colder = steady_state(torch.ones(1, 9, 9), affinity(field, 2.0, 8.0), 64.0, 0.2)[0]
    assert (colder[~inside] < warm[~inside]).all()


def test_uniform_heat_needs_no_target(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=0)
    found = [attribute(model, images, "heat_flow", target, base="uniform") for target in ("self", torch.randn(48))]
    assert torch.equal(*found)
    assert found[0].std() > 0
    assert torch.equal(attribute(model, images, "heat_flow:uniform"), found[0])
    with pytest.raises(UserError, match="rise has no base method: write 'rise', or 'heat_flow:gradcam'"):
        attribute(model, images, "rise:gradcam")


@pytest.mark.parametrize("base", ["gradcam", "integrated_gradients", "law_residual"])
def test_any_method_is_a_base(small_vit: Create, images: Tensor, base: str) -> None:
    model = small_vit(num_classes=0)
    options = {"steps": 2} if base == "integrated_gradients" else {}
    source = attribute(model, images, base, normalize=False, size="map", **options).abs()
    found = attribute(model, images, "heat_flow", normalize=False, size="map", base=base, **options)
    scale = 64 if base == "integrated_gradients" else 1  # the mean over a patch of 8 x 8 pixels, not the sum
    field = feature_map(model, images).detach()
    finer = field.shape[2] * field.shape[3] / 64
    expected = steady_state(source / scale, affinity(field, 2.0, 8.0 * finer**2), 64.0 * finer, 0.1 * finer**-0.5)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)


class Blobs(nn.Module):
    """A final map that says whether a position lies in an object, and which of two; as many positions as asked for."""

    num_features, num_classes = 3, 0

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.weight = nn.Parameter(torch.ones(1))

    def forward_features(self, images: Tensor) -> Tensor:
        row, column = torch.meshgrid(*[(torch.arange(self.side) + 0.5) / self.side] * 2, indexing="ij")
        left = (row - 0.4).square() + (column - 0.35).square() < 0.05
        right = (row - 0.6).square() + (column - 0.8).square() < 0.02
        field = torch.stack([left, right, ~(left | right)]).float()
        return self.weight * field.expand(len(images), -1, -1, -1)


def test_a_finer_grid_gives_the_same_map_of_the_image() -> None:
    def at(side: int, unscaled: bool = False) -> Tensor:
        finer = side**2 / 64 if unscaled else 1.0
        numbers = {"conductivity": 64 / finer, "neighbours": 8 / finer**2, "border": 0.1 * finer**0.5}
        found = attribute(Blobs(side), torch.zeros(1, 3, 96, 96), "heat_flow:uniform", size="map", **numbers)
        return torch.nn.functional.adaptive_avg_pool2d(found, 8)

    for side, bound in ((16, 0.04), (24, 0.02)):  # of maps whose largest value is 1
        assert (at(side) - at(32)).abs().mean() < bound
        assert (at(side, unscaled=True) - at(32, unscaled=True)).abs().mean() > 2 * bound


def test_an_unknown_base_is_answered_with_the_nearest(small_vit: Create, images: Tensor) -> None:
    with pytest.raises(UserError, match="did you mean 'gradcam'"):
        attribute(small_vit(num_classes=0), images, "heat_flow", base="grad_cam")


@pytest.mark.parametrize("option", ["conductivity", "sharpness", "neighbours", "border"])
@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_numbers_that_are_none_are_refused(small_cnn: Create, images: Tensor, option: str, value: float) -> None:
    with pytest.raises(UserError, match=f"{option}=.* must be a finite number"):
        attribute(small_cnn(), images, "heat_flow", base="uniform", **{option: value})
