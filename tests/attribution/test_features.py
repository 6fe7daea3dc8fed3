"""Features as colours and as codes: NumPy's principal components, in signs that stay, and cosines that survive."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution.components import principal_components
from heatssl.attribution.features import codes, colours, write_features
from heatssl.backbones import feature_map

Create = Callable[..., nn.Module]


@pytest.fixture
def field() -> Tensor:
    """Four maps (4, 10, 5, 3) whose channels vary unequally about a large mean."""
    generator = torch.Generator().manual_seed(0)
    mixed = torch.randn(4, 5, 3, 10, generator=generator) @ torch.randn(10, 10, generator=generator)
    return (mixed + 20).movedim(-1, 1)


def test_components_are_those_of_a_singular_value_decomposition(field: Tensor) -> None:
    found = principal_components(field, 4)
    vectors = field.double().movedim(1, -1).reshape(-1, 10).numpy()
    _, singular, rows = np.linalg.svd(vectors - vectors.mean(axis=0), full_matrices=False)
    signs = np.sign(np.take_along_axis(rows, np.abs(rows).argmax(axis=1)[:, None], axis=1))
    np.testing.assert_allclose(found.directions, (signs * rows)[:4], atol=1e-8)
    np.testing.assert_allclose(found.share, (singular**2 / (singular**2).sum())[:4], rtol=1e-8)
    projected = (vectors - vectors.mean(axis=0)) @ (signs * rows)[:4].T
    np.testing.assert_allclose(found.coordinates(field).reshape(-1, 4), projected, atol=1e-8)


def test_colours_do_not_depend_on_the_order_of_the_images(field: Tensor) -> None:
    order = torch.tensor([2, 0, 3, 1])
    one, other = (colours(principal_components(part, 3), part) for part in (field, field[order]))
    np.testing.assert_allclose(one[order], other, atol=1e-5)
    assert one.std(axis=(0, 1, 2)) == pytest.approx(1, rel=1e-3), "in deviations of each component"


def test_a_field_that_hardly_varies_has_colours_still() -> None:
    constant = torch.ones(1, 2, 3, 3)
    shown = colours(principal_components(constant, 3), constant)
    assert shown.shape == (1, 3, 3, 3)
    assert not shown.any()


def test_cosines_survive_eight_bits(field: Tensor) -> None:
    components = principal_components(field, 10)
    small = torch.from_numpy(codes(components.coordinates(field))).double().flatten(0, 2)
    exact = (field.double() - components.mean[:, None, None]).movedim(1, -1).flatten(0, 2)
    found, wanted = (F.normalize(vectors, dim=1) @ F.normalize(vectors, dim=1).T for vectors in (small, exact))
    assert (found - wanted).abs().max() < 0.015
    assert small.abs().amax(dim=1).eq(127).all()


def test_class_and_register_tokens_are_no_positions(small_vit: Create, images: Tensor, tmp_path: Path) -> None:
    model = small_vit(num_classes=0, reg_tokens=4)
    write_features(tmp_path / "features.npz", model, images, ["a", "b", "c"], chunk=2)
    arrays = np.load(tmp_path / "features.npz")
    assert arrays["colours"].shape == (3, 4, 4, 3)
    assert arrays["codes"].shape == (3, 4, 4, 32)
    assert arrays["image"].tolist() == ["a", "b", "c"]
    with torch.no_grad():
        field = feature_map(model, images)
    components = principal_components(field, 48)
    np.testing.assert_allclose(arrays["colours"], colours(components, field), atol=1e-3)
    assert arrays["code_share"] == pytest.approx(components.share[:32].sum().item())
    assert arrays["colour_share"] == pytest.approx(components.share[:3].numpy())
