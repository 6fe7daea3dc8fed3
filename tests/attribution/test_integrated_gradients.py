"""Integrated gradients promise a sum; a wrong path, baseline or rule breaks it or differs from captum."""

from collections.abc import Callable

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from heatssl.attribution import attribute, explain
from heatssl.backbones import pooled_features

Create = Callable[..., nn.Module]


def test_equals_captum(create: Create, images: Tensor) -> None:
    model = create(num_classes=5)
    captum = IntegratedGradients(model).attribute(images, target=2, n_steps=12, method="riemann_middle")
    ours = attribute(model, images, "integrated_gradients", 2, normalize=False, steps=12)
    expected = captum.sum(dim=1).float()
    assert (ours - expected).norm() < 1e-4 * expected.norm()


def test_equals_captum_for_the_cosine_to_oneself(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=0)
    own = pooled_features(model, images).detach()

    def cosine(x: Tensor, reference: Tensor) -> Tensor:
        return torch.cosine_similarity(pooled_features(model, x), reference)

    captum = IntegratedGradients(cosine).attribute(
        images, additional_forward_args=(own,), n_steps=10, method="riemann_middle"
    )
    ours = attribute(model, images, "integrated_gradients", "self", normalize=False, steps=10)
    expected = captum.sum(dim=1).float()
    assert (ours - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("target", ["self", 1])
def test_completeness_error_vanishes_with_steps(create: Create, target: str | int, images: Tensor) -> None:
    model = create(num_classes=5)
    coarse, fine = (
        explain(model, images, "integrated_gradients", target, steps=steps).completeness_error for steps in (1, 48)
    )
    assert coarse is not None
    assert fine is not None
    assert fine.max() < 0.05
    assert fine.mean() < 0.2 * coarse.mean()


def test_completeness_error_is_what_it_says(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=5)
    result = explain(model, images, "integrated_gradients", 4, steps=2)
    with torch.no_grad():
        rise = (model(images) - model(torch.zeros_like(images)))[:, 4]
    expected = (result.maps.sum(dim=(1, 2)) - rise).abs() / rise.abs()
    assert result.completeness_error is not None
    torch.testing.assert_close(result.completeness_error.float(), expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("chunk", [1, 2, 7])
def test_chunks_do_not_change_the_map(small_vit: Create, chunk: int, images: Tensor) -> None:
    model = small_vit(num_classes=5)
    whole = attribute(model, images, "integrated_gradients", 0, normalize=False, steps=6)
    parts = attribute(model, images, "integrated_gradients", 0, normalize=False, steps=6, chunk=chunk)
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-7)


def test_linear_model_gives_weight_times_input_on_the_planted_region(images: Tensor) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 2))
    weight = torch.zeros(2, 3, 32, 32)
    weight[1, :, 8:16, 16:24] = torch.randn(3, 8, 8, generator=torch.Generator().manual_seed(2))
    model[1].weight.data = weight.flatten(1)
    result = explain(model, images, "integrated_gradients", 1, steps=1)
    torch.testing.assert_close(result.maps, (images * weight[1]).sum(dim=1))
    assert result.completeness_error is not None
    assert result.completeness_error.max() < 1e-4
    outside = result.maps.clone()
    outside[:, 8:16, 16:24] = 0
    assert outside.abs().sum() == 0 < result.maps.abs().sum()


def test_memory_does_not_grow_with_steps(create: Create, images: Tensor) -> None:
    """The largest number of bytes that the graph keeps for its backward pass at a time."""

    def peak(steps: int, chunk: int) -> int:
        held, most = 0, 0

        class Kept:
            def __init__(self, tensor: Tensor) -> None:
                nonlocal held, most
                self.tensor, self.size = tensor, tensor.nbytes
                held += self.size
                most = max(most, held)

            def __del__(self) -> None:
                nonlocal held
                held -= self.size

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            explain(model, images, "integrated_gradients", 1, steps=steps, chunk=chunk)
        return most

    model = create(num_classes=5)
    few, many, large = peak(2, 3), peak(64, 3), peak(64, 12)
    assert many <= 1.01 * few
    assert large > 2 * many, "a larger chunk must show, or this measures nothing"
