"""LeJEPA: every view is drawn to the global ones, SIGReg weighs what it should, small views work."""

import pytest
import torch

from heatssl import objectives
from heatssl.backbones import create_backbone, feature_map
from heatssl.errors import UserError
from heatssl.objectives.lejepa import prediction_loss

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
SMALL = {"head_width": 32, "embedding_width": 8, "local_views": 2}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 32, arguments: dict | None = None, **settings):
    torch.manual_seed(0)
    backbone = create_backbone(name, size, **(TINY if arguments is None else arguments))
    return objectives.create({"name": "lejepa"} | SMALL | settings, backbone, size)


def test_prediction_loss_is_the_distance_to_the_mean_of_the_global_views():
    views = torch.randn(5, 6, 4)
    centre = (views[0] + views[1]) / 2
    expected = sum(((view - centre) ** 2).mean() for view in views) / 5
    assert prediction_loss(views, 2).item() == pytest.approx(expected.item(), rel=1e-5)
    assert prediction_loss(views[:1].expand(5, -1, -1), 2).item() == pytest.approx(0, abs=1e-12)


def test_prediction_loss_equals_lightly():
    reference = pytest.importorskip("lightly.loss.lejepa_loss").lejepa_invariance_loss
    views = torch.randn(5, 6, 4)
    expected = reference(all_proj=views, global_proj=views[:2])
    assert prediction_loss(views, 2).item() == pytest.approx(expected.item(), rel=1e-6)


def test_lambda_shares_the_loss_between_its_parts():
    images = torch.randn(4, 3, 32, 32)
    for share in (0.0, 0.3, 1.0):
        objective = tiny(isotropy_weight=share)
        torch.manual_seed(1)
        outputs = objective(images)
        parts = outputs.logs["loss/prediction"], outputs.logs["loss/isotropy"]
        assert outputs.loss.item() == pytest.approx((1 - share) * parts[0].item() + share * parts[1].item(), rel=1e-5)
        assert parts[0] > 0
        assert parts[1] > 0
    torch.manual_seed(1)
    assert torch.equal(outputs.loss, objective(images).loss), "a step of a resumed run repeats"


@pytest.mark.parametrize(
    ("name", "size", "arguments"),
    [
        ("vit_tiny_patch16_224", 64, TINY),
        ("vit_small_patch16_dinov3", 64, {"patch_size": 8, "depth": 1}),
        ("test_resnet", 64, {}),
    ],
)
def test_local_views_are_small_and_any_backbone_takes_them(name, size, arguments):
    objective = tiny(name, size, arguments)
    images = torch.randn(2, 3, size, size)
    maps = objective.maps(images)
    assert maps["first_view"].shape[2:] == (64, 64)
    assert maps["second_view"].shape[2:] == (32, 32), "98 of 224, in whole patches"
    outputs = objective(images)
    assert outputs.field.shape[0] == 4, "two global views of two images"
    assert torch.isfinite(outputs.loss)


def test_smaller_images_have_their_positions_resampled():
    backbone = create_backbone("vit_tiny_patch16_224", 64, **TINY).eval()
    half = create_backbone("vit_tiny_patch16_224", 32, **TINY).eval()
    weights = backbone.state_dict()
    from timm.layers import resample_abs_pos_embed

    weights["pos_embed"] = resample_abs_pos_embed(weights["pos_embed"], new_size=[4, 4], num_prefix_tokens=1)
    half.load_state_dict(weights)
    images = torch.randn(2, 3, 32, 32)
    assert torch.allclose(feature_map(backbone, images), feature_map(half, images), atol=1e-5)


def test_it_learns_and_does_not_collapse():
    objective = tiny(isotropy_weight=0.1, local_views=0, colour_jitter=0.0, grey=0.0, blur=0.0)
    images = torch.randn(16, 3, 1, 1) + 0.3 * torch.randn(16, 3, 32, 32)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    first = objective(images)
    for _ in range(15):
        outputs = objective(images)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert outputs.loss < 0.6 * first.loss
    assert outputs.logs["loss/isotropy"] < 0.5 * first.logs["loss/isotropy"]
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"isotropy_weight": 1.5}, "between 0 and 1"),
        ({"global_views": 1, "local_views": 0}, "two views"),
        ({"local_scale": [0.0, 0.3]}, "two fractions"),
        ({"name": "swin_tiny_patch4_window7_224", "size": 64, "arguments": {"window_size": 2}}, "local_views=0"),
    ],
)
def test_bad_settings_name_the_fix(settings, fix):
    with pytest.raises(UserError, match=fix):
        tiny(**settings)
