"""Methods that differentiate with respect to the image or a layer, held against captum and closed forms."""

from collections.abc import Callable

import pytest
import torch
from captum.attr import LayerIntegratedGradients, Saliency
from torch import Tensor, nn

from heatssl.attribution import attribute, explain
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


class Cube(nn.Module):
    """Logit 0 is the sum of the cubes of all values: its gradient is known everywhere."""

    num_classes = 1

    def forward(self, x: Tensor) -> Tensor:
        return x.pow(3).flatten(1).sum(dim=1, keepdim=True)


def test_saliency_equals_captum(create: Create, images: Tensor) -> None:
    model = create(num_classes=5)
    expected = Saliency(model).attribute(images.clone(), target=2).amax(dim=1)
    torch.testing.assert_close(attribute(model, images, "saliency", 2, normalize=False), expected, rtol=1e-4, atol=1e-6)


def test_layer_integrated_gradients_equal_captum(small_cnn: Create, small_vit: Create, images: Tensor) -> None:
    for model, name in ((small_cnn(num_classes=5), "layer3"), (small_vit(num_classes=5), "blocks.0")):
        captum = LayerIntegratedGradients(model, model.get_submodule(name))
        expected = captum.attribute(
            images, torch.zeros_like(images), target=2, n_steps=6, method="riemann_middle"
        ).float()
        if expected.ndim == 3:
            expected = expected[:, 1:].mT.unflatten(2, (4, 4))
        expected = expected.sum(dim=1)
        ours = attribute(
            model, images, "layer_integrated_gradients", 2, layer=name, steps=6, size="map", normalize=False
        )
        assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_the_completeness_error_of_a_layer_vanishes_with_steps(create: Create, images: Tensor) -> None:
    model = create(num_classes=5)
    layer = "blocks.0" if hasattr(model, "blocks") else "layer3"
    coarse, fine = (
        explain(model, images, "layer_integrated_gradients", 1, layer=layer, steps=steps).completeness_error
        for steps in (1, 48)
    )
    assert fine.max() < 0.05
    assert fine.mean() < 0.2 * coarse.mean()


def test_smoothgrad_is_the_saliency_of_the_smoothed_score(images: Tensor) -> None:
    """Of x^3 under noise: 3 (x^2 + sigma^2), sigma a share of the range of each image."""
    images[1] *= 2
    found = attribute(Cube(), images, "smoothgrad", 0, samples=2000, noise=0.1, normalize=False)
    sigma = 0.1 * (images.amax(dim=(1, 2, 3)) - images.amin(dim=(1, 2, 3)))
    expected = (3 * (images.square() + sigma[:, None, None, None].square())).amax(dim=1)
    assert (found - expected).norm() < 0.03 * expected.norm()
    torch.testing.assert_close(
        attribute(Cube(), images, "smoothgrad", 0, noise=0.0, normalize=False),
        attribute(Cube(), images, "saliency", 0, normalize=False),
    )


def test_expected_gradients_sum_to_the_rise_from_the_other_images(images: Tensor) -> None:
    images[0] += 1
    maps = attribute(Cube(), images, "expected_gradients", 0, samples=400, normalize=False)
    scores = Cube()(images)[:, 0]
    rise = scores - (scores.sum() - scores) / 2
    assert ((maps.sum(dim=(1, 2)) - rise).abs() < 0.1 * scores.abs().max()).all()
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    two = images[:2]
    found = attribute(linear, two, "expected_gradients", 1, samples=2, normalize=False)
    weight = linear[1].weight[1].detach().unflatten(0, (3, 32, 32))
    torch.testing.assert_close(found, (weight * (two - two.flip(0))).sum(dim=1), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="two images"):
        attribute(linear, images[:1], "expected_gradients", 1)


def test_fixed_baselines_make_a_map_that_no_batch_changes(images: Tensor) -> None:
    linear = nn.Sequential(nn.Flatten(), nn.Linear(3072, 2))
    baselines = torch.randn(1, 3, 32, 32)
    found = attribute(linear, images[:1], "expected_gradients", 1, samples=2, normalize=False, baselines=baselines)
    weight = linear[1].weight[1].detach().unflatten(0, (3, 32, 32))
    torch.testing.assert_close(found, (weight * (images[:1] - baselines)).sum(dim=1), rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="baselines must be"):
        attribute(linear, images, "expected_gradients", 1, baselines=baselines[..., :16])


@pytest.mark.parametrize("method", ["smoothgrad", "expected_gradients", "rise"])
def test_a_seed_repeats_a_map_and_another_gives_another(small_cnn: Create, images: Tensor, method: str) -> None:
    model = small_cnn(num_classes=5)
    first, again, other = (attribute(model, images, method, 1, samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("method", "options"),
    [("smoothgrad", {"noise": float("nan")}), ("rise", {"kept": float("nan")}), ("rise", {"samples": 0})],
)
def test_numbers_out_of_range_are_refused(images: Tensor, method: str, options: dict[str, float]) -> None:
    with pytest.raises(UserError, match=f"{method} needs samples >= 1"):
        attribute(Cube(), images, method, 0, **options)
