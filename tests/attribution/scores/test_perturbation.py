"""Curves and infidelity: closed forms on a linear model, captum, and independence of chunks."""

from collections.abc import Callable

import pytest
import torch
from captum.metrics import infidelity as captum_infidelity
from torch import Tensor, nn

from heatssl.attribution import explain
from heatssl.attribution.scores import deletion, infidelity, insertion, perturbation_curve, random_squares
from heatssl.attribution.scores.perturbation import baseline_of
from heatssl.attribution.targets import make_target
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


class Linear:
    """The sum of weight times image."""

    uses_classifier = False

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight
        self.largest = 0

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        self.largest = max(self.largest, len(points))
        return (points * self.weight).sum(dim=(1, 2, 3))


@pytest.fixture
def linear() -> tuple[Linear, Tensor, Tensor]:
    """A linear target, images (2, 3, 4, 4), and each pixel's exact share (2, 4, 4)."""
    generator = torch.Generator().manual_seed(0)
    weight, images = torch.randn(3, 4, 4, generator=generator), torch.randn(2, 3, 4, 4, generator=generator)
    return Linear(weight), images, (weight * images).sum(dim=1)


def test_deletion_and_insertion_of_a_linear_model_have_a_closed_form(linear: tuple[Linear, Tensor, Tensor]) -> None:
    target, images, shares = linear
    ordered = shares.flatten(1).sort(dim=1, descending=True).values
    grown = torch.cat([torch.zeros(2, 1), ordered.cumsum(dim=1)], dim=1)  # the sum of the k largest
    fallen = grown[:, -1:] - grown
    torch.testing.assert_close(deletion(target, images, shares, steps=16), torch.trapezoid(fallen, dx=1 / 16))
    risen = insertion(target, images, shares, steps=16, baseline="mean")
    torch.testing.assert_close(risen, torch.trapezoid(grown, dx=1 / 16))
    every_fourth = perturbation_curve(target, images, torch.zeros_like(images), shares, steps=4)
    torch.testing.assert_close(every_fourth, fallen[:, ::4])


def test_the_exact_order_beats_every_other(linear: tuple[Linear, Tensor, Tensor]) -> None:
    target, images, shares = linear
    for seed in range(5):
        other = torch.rand(2, 4, 4, generator=torch.Generator().manual_seed(seed))
        assert (deletion(target, images, shares, steps=16) < deletion(target, images, other, steps=16)).all()
        exact, risen = (insertion(target, images, maps, steps=16, baseline="mean") for maps in (shares, other))
        assert (exact > risen).all()


def test_the_curve_runs_from_image_to_baseline_whatever_the_chunk(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=0)
    target = make_target(model, images, "self")
    maps = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    black = torch.zeros_like(images)
    curve = perturbation_curve(target, images, black, maps, steps=5)
    torch.testing.assert_close(curve, perturbation_curve(target, images, black, maps, steps=5, chunk=4))
    alone = perturbation_curve(make_target(model, images[1:2], "self"), images[1:2], black[:1], maps[1:2], steps=5)
    torch.testing.assert_close(curve[1:2], alone)
    torch.testing.assert_close(curve[:, 0], torch.ones(3))
    torch.testing.assert_close(curve[:, -1], target(black, torch.arange(3)).detach())
    assert not curve.requires_grad


def test_no_forward_pass_is_larger_than_its_chunk(linear: tuple[Linear, Tensor, Tensor]) -> None:
    target, images, shares = linear
    deletion(target, images, shares, steps=16, chunk=5)
    infidelity(target, images, shares, random_squares(9, 4, 4), chunk=5)
    assert target.largest == 5


def test_equal_pixels_are_not_replaced_row_by_row(linear: tuple[Linear, Tensor, Tensor]) -> None:
    """A rectified map is zero over large parts: from the top down, a scene's sky would go first."""
    seen: list[Tensor] = []

    def target(points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        seen.append(points)
        return points.sum(dim=(1, 2, 3))

    images = torch.ones(1, 3, 16, 16)
    perturbation_curve(target, images, torch.zeros_like(images), torch.zeros(1, 16, 16), steps=2)
    rows = torch.cat(seen)[1, 0].sum(dim=1)  # half of the pixels are gone
    assert rows.sum() == 128
    assert rows.min() > 2
    assert rows.max() < 14


def test_the_blurred_baseline_hides_detail_and_keeps_colour() -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blurred = baseline_of(images, "blurred")
    assert blurred.std() < 0.1 * images.std()
    torch.testing.assert_close(blurred.mean(), images.mean(), rtol=0.02, atol=0)


@pytest.mark.parametrize("scaled", [False, True])
def test_infidelity_is_captums(create: Create, images: Tensor, scaled: bool) -> None:
    model = create(num_classes=4)
    maps = explain(model, images, "integrated_gradients", 2, steps=4).maps
    masks = random_squares(6, 32, 32)
    found = infidelity(make_target(model, images, 2), images, maps, masks, scaled=scaled)
    drawn = iter(masks)

    def perturb(inputs: Tensor) -> tuple[Tensor, Tensor]:
        mask = next(drawn).expand_as(inputs)
        return mask, inputs * (1 - mask)

    expected = captum_infidelity(
        model,
        perturb,
        images,
        maps[:, None].expand_as(images) / 3,  # captum's maps have colours; their sum is ours
        target=2,
        n_perturb_samples=6,
        max_examples_per_batch=3,
        normalize=scaled,
    )
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-7)


def test_the_exact_shares_of_a_linear_model_have_no_infidelity(linear: tuple[Linear, Tensor, Tensor]) -> None:
    target, images, shares = linear
    masks = random_squares(20, 4, 4)
    exact = infidelity(target, images, shares, masks, scaled=False)
    torch.testing.assert_close(exact, torch.zeros(2), rtol=0, atol=1e-8)
    doubled = infidelity(target, images, 2 * shares, masks)
    torch.testing.assert_close(doubled, torch.zeros(2), rtol=0, atol=1e-8)
    assert (infidelity(target, images, shares.flip(1), masks) > 1e-3).all()


def test_squares_are_where_they_may_be() -> None:
    masks = random_squares(200, 32, 48)
    assert torch.equal(masks, random_squares(200, 32, 48))
    areas = masks.sum(dim=(1, 2))
    assert areas.min() >= 16
    assert areas.max() <= 256
    assert masks.any(dim=0).float().mean() > 0.9


def test_maps_of_another_size_are_refused(linear: tuple[Linear, Tensor, Tensor]) -> None:
    target, images, shares = linear
    with pytest.raises(UserError, match="maps must be"):
        deletion(target, images, shares[:, :2])


def test_half_precision_is_close_to_single(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=4)
    maps = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = random_squares(5, 32, 32)
    single = [make_target(model, images, 2), images]
    half = [make_target(model.to(torch.bfloat16), images.bfloat16(), 2), images.bfloat16()]
    found = [deletion(*half, maps.bfloat16()), infidelity(*half, maps.bfloat16(), masks)]
    assert all(values.dtype == torch.float32 for values in found)
    model.float()
    expected = [deletion(*single, maps), infidelity(*single, maps, masks)]
    torch.testing.assert_close(found[0], expected[0], rtol=0.05, atol=0.05)
    torch.testing.assert_close(found[1], expected[1], rtol=0.2, atol=0.02)
