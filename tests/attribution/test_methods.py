"""What every method owes its user, whatever the backbone: a finite map of the right size, for each image its own."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from heatssl.attribution import attribute, explain, method_names
from heatssl.attribution.attribute import find_method
from heatssl.errors import UserError
from heatssl.heat import FirstOrder, Laplace

Create = Callable[..., nn.Module]

FAST: dict[str, dict[str, Any]] = {
    "expected_gradients": {"samples": 4},
    "integrated_gradients": {"steps": 3},
    "layer_integrated_gradients": {"steps": 3},
    "occlusion": {"window": 16, "stride": 8},
    "rise": {"samples": 12, "cells": 3},
    "smoothgrad": {"samples": 3},
}
KINDS = ["vit, class token", "vit, registers, mean", "cnn", "gau", "flash", "roformer_v2"]
REFUSALS = {
    ("cam", "vit, class token", 3): "class token",
    **{
        (method, kind, target): "no attention over all"
        for method in ("attention_rollout", "gradient_rollout")
        for kind in ("cnn", "flash")
        for target in ("self", 3)
    },
}
# Baselines come from the batch: their order is part of the result.
OF_THE_BATCH = {"expected_gradients"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", method_names())
def test_every_method_runs_on_every_backbone_or_says_what_would(
    kinds: dict[str, nn.Module], method: str, kind: str, images: Tensor
) -> None:
    for target in ("self", 3):
        if (method, kind, target) in REFUSALS:
            with pytest.raises(UserError, match=REFUSALS[method, kind, target]):
                attribute(kinds[kind], images, method, target)
            continue
        maps = attribute(kinds[kind], images, method, target, **FAST.get(method, {}))
        assert maps.shape == (3, 32, 32)
        assert maps.dtype == torch.float32
        assert maps.min() >= 0
        assert maps.amax() == 1
        assert not any(module._forward_hooks for module in kinds[kind].modules())
        assert "forward_features" not in vars(kinds[kind])


@pytest.mark.parametrize("method", method_names())
def test_images_of_another_size_have_the_maps_of_a_model_made_for_it(
    small_vit: Create, method: str, images: Tensor
) -> None:
    model, larger = small_vit(), nn.functional.interpolate(images, (48, 32))
    options = FAST.get(method, {}) | {"normalize": False}
    torch.manual_seed(1)
    found = attribute(model, larger, method, **options)
    model.set_input_size(img_size=(48, 32))  # type: ignore[operator]
    torch.manual_seed(1)
    torch.testing.assert_close(found, attribute(model, larger, method, **options), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", method_names())
def test_a_map_is_of_its_image_alone_and_no_chunk_changes_it(
    kinds: dict[str, nn.Module], method: str, images: Tensor
) -> None:
    model, options = kinds["vit, registers, mean"], FAST.get(method, {})
    maps = attribute(model, images, method, normalize=False, **options)
    chunked = attribute(model, images, method, normalize=False, chunk=2, **options)
    torch.testing.assert_close(chunked, maps, rtol=1e-4, atol=1e-5 * maps.abs().max().item())
    if method not in OF_THE_BATCH:
        turned = attribute(model, images.roll(1, 0), method, normalize=False, **options)
        torch.testing.assert_close(turned.roll(-1, 0), maps, rtol=1e-4, atol=1e-5 * maps.abs().max().item())


@pytest.mark.parametrize("method", method_names())
def test_bfloat16_gives_almost_the_map_of_float32(small_cnn: Create, small_vit: Create, method: str) -> None:
    """Half precision inside a method's own arithmetic: an unstable factorisation, a sum over many steps."""
    create = small_vit if "rollout" in method else small_cnn
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model, options = create(num_classes=5, global_pool="avg"), FAST.get(method, {})
    if "rollout" in method:
        for block in model.blocks:  # untrained attention is almost even, and so is what rolls out of it
            block.attn.qkv.weight.data *= 10
    expected = attribute(model, images, method, 3, normalize=False, **options)
    with torch.autocast("cpu", torch.bfloat16):
        autocast = attribute(model, images, method, 3, normalize=False, **options)
    half = attribute(model.bfloat16(), images.bfloat16(), method, 3, normalize=False, **options)
    for found in (autocast, half):
        assert found.dtype == torch.float32
        assert torch.corrcoef(torch.stack([found.flatten(), expected.flatten()]))[0, 1] > 0.97


@pytest.mark.parametrize("method", method_names())
def test_chunk_bounds_the_images_of_a_forward_pass(kinds: dict[str, nn.Module], method: str, images: Tensor) -> None:
    """What memory needs: neither steps nor samples nor the batch may make a pass larger."""
    model = kinds["vit, registers, mean"]
    passes: list[int] = []
    handle = model.blocks[0].register_forward_hook(lambda _module, _inputs, output: passes.append(len(output)))
    # A target that needs no pass of its own.
    find_method(method)(model, images, _SumOfLogits(model), chunk=2, **FAST.get(method, {}))
    handle.remove()
    assert max(passes) == 2


class _SumOfLogits:
    uses_classifier = True

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, points: Tensor, owner: Tensor, local: bool = False) -> Tensor:
        return self.model(points).sum(dim=1)


def test_law_residual_is_that_of_the_final_map(kinds: dict[str, nn.Module], images: Tensor) -> None:
    model = kinds["gau"]
    field = model.forward_features(images).mT.unflatten(2, (4, 4)).detach()
    found = explain(model, images, "law_residual").maps
    torch.testing.assert_close(found, Laplace(boundary="replicate").residual(field))
    law = FirstOrder(channels=48)
    torch.testing.assert_close(explain(model, images, "law_residual", law=law).maps, law.residual(field).detach())
    for message, wrong in {"expects a field": FirstOrder(channels=8), "border": Laplace()}.items():
        with pytest.raises(UserError, match=message):
            attribute(model, images, "law_residual", law=wrong)
