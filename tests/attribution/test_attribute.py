"""The public function: ranges, sizes, targets, and that it leaves the model and the caller as they were."""

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from heatssl.attribution import attribute, explain, method_names, methods, overlay
from heatssl.backbones import pooled_features
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

Create = Callable[..., nn.Module]


def _probe(channels: int, classes: int = 4) -> LinearProbe:
    generator = torch.Generator().manual_seed(3)
    # Positive: a class that nothing speaks for has an empty Grad-CAM.
    weight = torch.rand(classes, channels, generator=generator)
    return LinearProbe(weight, torch.zeros(classes), torch.zeros(channels), torch.ones(channels))


@pytest.mark.parametrize("method", ["gradcam", "integrated_gradients"])
@pytest.mark.parametrize("family", ["vit", "vit with registers", "cnn"])
@pytest.mark.parametrize("kind", ["self", "embedding", "probe", "classifier", "labels"])
def test_every_target_gives_a_map_in_the_unit_range(
    small_vit: Create, small_cnn: Create, method: str, family: str, kind: str, images: Tensor
) -> None:
    create = small_cnn if family == "cnn" else partial(small_vit, reg_tokens=4 if "registers" in family else 0)
    model = create(num_classes=6 if kind in ("classifier", "labels") else 0)
    channels = pooled_features(model, images).shape[1]
    other = pooled_features(model, images.flip(3))[0].detach()
    target = {
        "self": "self",
        "embedding": other,
        # A positive logit is a sum over positions, so at least one of them is positive.
        "probe": int(_probe(channels).logits(pooled_features(model, images)).mean(0).argmax()),
        "classifier": 5,
        "labels": torch.tensor([0, 5, 1]),
    }[kind]
    options = {"probe": _probe(channels)} if kind == "probe" else {}
    if method == "integrated_gradients":
        options["steps"] = 3
    maps = attribute(model, images, method, target, **options)
    assert maps.shape == (3, 32, 32)
    assert maps.min() >= 0
    # Grad-CAM may be empty for an image that holds nothing of the class; never for all of them.
    assert maps.amax() == 1
    assert torch.isfinite(maps).all()
    assert attribute(model, images, method, target, size="map", **options).shape == (3, 4, 4)


def test_labels_per_image_equal_one_call_per_label(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=6)
    together = attribute(model, images, "integrated_gradients", torch.tensor([4, 0, 2]), normalize=False, steps=4)
    for row, label in enumerate((4, 0, 2)):
        alone = attribute(model, images[row : row + 1], "integrated_gradients", label, normalize=False, steps=4)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-6)
    labels = np.array([4, 0, 2])
    assert torch.equal(attribute(model, images, target=labels), attribute(model, images, target=torch.tensor(labels)))
    assert torch.equal(attribute(model, images, target=labels[0]), attribute(model, images, target=4))


@pytest.mark.parametrize("method", ["gradcam", "saliency", "attention_rollout"])
def test_a_compiled_model_is_the_model(small_vit: Create, images: Tensor, method: str) -> None:
    model = small_vit(num_classes=3)
    compiled = torch.compile(model)
    assert torch.equal(attribute(compiled, images, method, 1), attribute(model, images, method, 1))
    assert torch.equal(explain(compiled, images, method, 1).maps, explain(model, images, method, 1).maps)


def test_the_probe_is_a_classifier_of_the_pooled_embedding(small_vit: Create, images: Tensor) -> None:
    """A ViT whose own head is the probe must get the very same map."""
    model = small_vit(num_classes=4, global_pool="avg", final_norm=True, fc_norm=False)
    probe = LinearProbe(model.head.weight.detach(), model.head.bias.detach(), torch.zeros(48), torch.ones(48))
    own = attribute(model, images, "integrated_gradients", 1, normalize=False, steps=4)
    probed = attribute(model, images, "integrated_gradients", 1, normalize=False, steps=4, probe=probe)
    torch.testing.assert_close(own, probed, rtol=1e-4, atol=1e-6)


def test_geometry_comes_from_the_model(small_vit: Create) -> None:
    wide = torch.randn(2, 3, 32, 48)
    model = small_vit(num_classes=0, img_size=(32, 48))
    assert attribute(model, wide, size="map").shape == (2, 4, 6)
    assert attribute(model, wide).shape == (2, 32, 48)


def test_the_coarse_map_of_integrated_gradients_keeps_the_sum(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=0)
    fine = attribute(model, images, "integrated_gradients", normalize=False, steps=4)
    coarse = attribute(model, images, "integrated_gradients", normalize=False, steps=4, size="map")
    assert coarse.shape == (3, 4, 4)
    torch.testing.assert_close(coarse[0, 1, 2], fine[0, 8:16, 16:24].sum(), rtol=1e-4, atol=1e-6)


def test_model_and_caller_stay_as_they_were(small_cnn: Create, images: Tensor) -> None:
    model = small_cnn(num_classes=4)
    model.layer1.train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    with torch.inference_mode():
        maps = attribute(model, images + 0, "gradcam", 1)
    assert maps.amax() > 0
    assert model.layer1.training
    assert not model.layer2.training
    assert "forward_features" not in vars(model)
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_methods_are_found_by_file_name() -> None:
    files = Path(methods.__file__).parent.glob("[a-z]*.py")
    assert method_names() == sorted(file.stem for file in files)
    assert {"gradcam", "heat_flow", "rise"} < set(method_names())


def test_bad_input_names_the_fix(small_vit: Create, images: Tensor) -> None:
    plain, classifier = small_vit(num_classes=0), small_vit(num_classes=3)
    for message, call in {
        "did you mean 'gradcam'": (plain, images, "grad_cam"),
        "no classifier": (plain, images, "gradcam", 1),
        "3 classes": (classifier, images, "gradcam", 3),
        "use 'self'": (plain, images, "gradcam", "cat"),
        "target embedding": (plain, images, "gradcam", torch.zeros(7)),
        "normalised floats": (plain, images.to(torch.uint8)),
        "not torch.float32 (0, 3, 32, 32)": (plain, images[:0]),
        "one for each image": (classifier, images, "gradcam", torch.tensor([1, 2])),
        "NaN": (plain, images * float("nan")),
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            attribute(*call)


def test_overlay_shows_heat_where_it_is_and_its_scale() -> None:
    grey = np.full((32, 32, 3), 128, dtype=np.uint8)
    heat = np.zeros((4, 4), dtype=np.float32)
    heat[0, 3] = 1.0
    picture = np.asarray(overlay(grey, heat, size=128, largest=0.031)).astype(int)
    assert picture.shape[0] == 128
    assert 128 < picture.shape[1] < 200
    bright, dark = picture[8, 120].sum(), picture[110, 10].sum()
    assert bright > dark + 200
    # The bar runs from the brightest colour at its top to the darkest at its bottom, beside written labels.
    column = picture[8:120, 128 + 6].sum(axis=1)
    assert column[0] > column[-1] + 300
    labels = picture[:, 128 + 12 :]
    assert (labels[:20] < 100).any()
    assert (labels[-20:] < 100).any()
    assert not np.array_equal(
        picture, np.asarray(overlay(grey, heat, size=128, largest=0.5)).astype(int)[:, : picture.shape[1]]
    )


def test_the_heat_alone_shows_nothing_of_the_image() -> None:
    heat = np.random.default_rng(0).random((8, 8)).astype(np.float32)
    photograph = np.random.default_rng(1).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    alone = np.asarray(overlay(None, heat, size=64))
    over_white = np.asarray(overlay(np.full_like(photograph, 255), heat, size=64))
    assert alone.shape == over_white.shape
    assert (alone[0, 0] != over_white[0, 0]).any()
    brightest = np.unravel_index(heat.argmax(), heat.shape)
    y, x = (8 * brightest[0] + 4, 8 * brightest[1] + 4)
    assert alone[y, x].sum() > 500  # opaque: the top of the colour map


@pytest.mark.parametrize("method", ["gradient_rollout", "gradcam"])
def test_gradient_checkpointing_changes_no_map_and_stays_on(small_vit: Create, images: Tensor, method: str) -> None:
    """Layers that run again in the backward pass must not be taken for those that were recorded."""
    model = small_vit(num_classes=0)
    plain = attribute(model, images, method)
    model.set_grad_checkpointing(True)
    assert torch.equal(attribute(model, images, method), plain)
    assert model.grad_checkpointing
