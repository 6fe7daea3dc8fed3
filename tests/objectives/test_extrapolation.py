"""What a law makes of a quarter: made of that quarter alone, and held against what the whole image gives."""

import pytest
import torch
from torch import Tensor

from heatssl import objectives
from heatssl.backbones import create_backbone, feature_map
from heatssl.objectives import Extrapolation, Objective

TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
LAWS = {
    "qb_heat": {"name": "qb_heat", "decoder_width": 16},
    "finola": {"name": "finola", "decoder_width": 16},
    "heat_jepa": {"name": "heat_jepa"},
    "heat_jepa in its frame of rest": {"name": "heat_jepa", "transport": True},
    "heat_completion": {"name": "heat_completion"},
}


def _tiny(settings: dict[str, object]) -> Objective:
    torch.manual_seed(0)
    return objectives.create(dict(settings), create_backbone("vit_tiny_patch16_224", 32, **TINY), 32).eval()


def _of(objective: Objective, images: Tensor) -> Extrapolation:
    found = objective.extrapolation(images)
    assert found is not None
    return found


@pytest.mark.parametrize("name", LAWS)
def test_hidden_pixels_change_what_is_seen_and_nothing_that_is_filled_in(name: str) -> None:
    objective, images = _tiny(LAWS[name]), torch.randn(4, 3, 32, 32)
    given = _of(objective, images)
    assert given.filled.shape == given.seen.shape == (4, 24, 4, 4)
    assert given.visible.sum(dim=(1, 2)).tolist() == [4] * 4
    pixels = given.visible.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2)[:, None]
    changed = _of(objective, torch.where(pixels, images, -images))
    torch.testing.assert_close(changed.filled, given.filled)
    assert not torch.allclose(changed.seen, given.seen, atol=1e-3)


@pytest.mark.parametrize("name", LAWS)
def test_what_is_seen_is_the_field_of_the_whole_image(name: str) -> None:
    """In the coordinates of the law, so that the two can be subtracted."""
    objective, images = _tiny(LAWS[name]), torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        features = feature_map(objective.backbone, images)
        weight, bias = objective.to_field.parameters()
        by_patch = weight.flatten(1) @ features.flatten(2) + bias[:, None]
    torch.testing.assert_close(_of(objective, images).seen, by_patch.unflatten(2, (4, 4)))


def test_heat_at_rest_is_the_quarters_mean() -> None:
    given = _of(_tiny(LAWS["heat_jepa"]), torch.randn(2, 3, 32, 32))
    mean = given.filled[:, :, :2, :2].mean(dim=(2, 3))
    torch.testing.assert_close(given.filled[:, :, 2:, 2:], mean[..., None, None].expand(-1, -1, 2, 2))


def test_a_copied_quarter_is_its_copy() -> None:
    given = _of(_tiny({"name": "qb_heat", "law": "copy", "decoder_width": 16}), torch.randn(4, 3, 32, 32))
    torch.testing.assert_close(given.filled[:, :, :2], given.filled[:, :, 2:])


@pytest.mark.parametrize("name", sorted(set(objectives.names()) - {law["name"] for law in LAWS.values()}))
def test_without_a_law_there_is_none(name: str) -> None:
    small = {"mae": {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}, "lejepa": {"head_width": 16}}
    assert _tiny({"name": name, **small.get(name, {})}).extrapolation(torch.randn(2, 3, 32, 32)) is None
