"""SimMIM: squares are hidden, the backbone is told where and not what, and the loss is the paper's."""

import pytest
import torch

from heatssl import objectives
from heatssl.backbones import create_backbone, encode_masked, feature_map
from heatssl.errors import UserError

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 64, arguments: dict | None = None, **settings):
    torch.manual_seed(0)
    backbone = create_backbone(name, size, **(TINY if arguments is None else arguments))
    return objectives.create({"name": "simmim"} | settings, backbone, size)


def test_squares_are_hidden_at_random():
    objective = tiny(mask_unit=16)
    mask = objective.draw_mask(torch.zeros(400, 3, 64, 64))
    squares = mask.view(400, 4, 2, 4, 2).transpose(2, 3).flatten(3)
    assert torch.equal(squares.all(3), squares.any(3)), "each square is hidden or visible as a whole"
    hidden = squares.any(3).flatten(1)
    assert (hidden.sum(1) == 10).all(), "60 % of 16, rounded up"
    assert hidden.float().mean(0).sub(10 / 16).abs().max() < 0.1
    torch.manual_seed(3)
    one = objective.draw_mask(torch.zeros(4, 3, 64, 64))
    torch.manual_seed(3)
    assert torch.equal(one, objective.draw_mask(torch.zeros(4, 3, 64, 64)))


@pytest.mark.parametrize(
    ("size", "patch", "unit", "units"), [(224, 16, 2, 7), (96, 8, 2, 6), (64, 8, 1, 8), (160, 8, 3, 7)]
)
def test_a_square_is_a_seventh_of_the_image(size, patch, unit, units):
    """32 pixels at 224. Where squares do not divide the grid (20 by 3) the last ones are cut."""
    objective = tiny(size=size, arguments=TINY | {"patch_size": patch, "depth": 1})
    assert (objective.unit, objective.units) == (unit, (units, units))
    assert objective.draw_mask(torch.zeros(1, 3, size, size)).shape == (1, size // patch, size // patch)


def test_loss_is_the_mean_distance_over_hidden_pixels():
    objective = tiny(mask_unit=16).eval()
    images = torch.randn(3, 3, 64, 64)
    torch.manual_seed(1)
    loss = objective(images).loss
    torch.manual_seed(1)
    hidden = objective.draw_mask(images)
    painted = torch.nn.functional.pixel_shuffle(
        objective.head(encode_masked(objective.backbone, images, hidden, objective.mask_token)), 8
    )
    pixels = hidden.repeat_interleave(8, 1).repeat_interleave(8, 2)
    expected = torch.cat([(painted - images)[b][:, pixels[b]].abs().flatten() for b in range(3)]).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.manual_seed(1)
    assert torch.equal(objective.maps(images)["visible_mask"], ~pixels)


SWIN = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 2), "window_size": 4}


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("vit_tiny_patch16_224", TINY),
        ("vit_small_patch16_dinov3", {"patch_size": 8, "depth": 1}),
        ("swin_tiny_patch4_window7_224", SWIN),
    ],
)
def test_hidden_pixels_have_no_influence_and_visible_ones_have(name, arguments):
    objective = tiny(name, arguments=arguments).eval()
    images, backbone, token = torch.randn(2, 3, 64, 64), objective.backbone, objective.mask_token
    hidden = objective.draw_mask(images)
    pixels = hidden.repeat_interleave(objective.patch, 1).repeat_interleave(objective.patch, 2)[:, None]
    field = encode_masked(backbone, images, hidden, token)
    assert torch.equal(field, encode_masked(backbone, torch.where(pixels, images + 1, images), hidden, token))
    changed = encode_masked(backbone, torch.where(pixels, images, images + torch.randn_like(images)), hidden, token)
    assert not torch.allclose(field, changed, atol=1e-3)
    assert torch.equal(encode_masked(backbone, images, torch.zeros_like(hidden), token), feature_map(backbone, images))
    assert not backbone.patch_embed._forward_hooks, "the backbone is left as it was"


def test_it_learns_two_images():
    objective = tiny(size=32, mask_unit=16, mask_ratio=0.4)
    y, x = torch.meshgrid(torch.linspace(0, 9, 32), torch.linspace(0, 7, 32), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(x - y)])[:, None].repeat(2, 3, 1, 1)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    losses = []
    for _ in range(35):
        losses.append(objective(waves).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.5 * losses[0]
    assert objective.mask_token.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"name": "test_resnet", "arguments": {}}, "no patch embedding"),
        ({"mask_unit": 12}, "multiple of the feature stride"),
        ({"mask_ratio": 1.0}, "hides 64 of 64"),
        ({"mask_ratio": 0.0}, "hides 0 of 64"),
    ],
)
def test_bad_settings_name_the_fix(settings, fix):
    with pytest.raises(UserError, match=fix):
        tiny(**settings)
