"""If these fail, what timm does to its own models goes wrong with ours: made again, made elsewhere, loaded, padded."""

import math

import pytest
import timm
import torch
from torch import nn

from heatssl.backbones import NormaliserSettings, PositionSettings, set_normaliser, set_positions

KINDS = {
    "gau": ("gau_tiny_patch16_224", {"key_width": 16}),
    "flash": ("flash_small_patch16_224", {"key_width": 16, "chunk": 3}),
    "roformer_v2": ("roformer_v2_small_patch16_224", {"num_heads": 3}),
}


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def small(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    name, own = KINDS[kind]
    usual = {"img_size": 64, "patch_size": 8, "embed_dim": 48, "depth": 4, "num_classes": 10}
    return timm.create_model(name, **usual | own | settings).eval()


@pytest.mark.parametrize("settings", [{"positions": "interpolated"}, {"pos_embed": "learn"}], ids=["places", "table"])
def test_timm_makes_a_model_of_another_size_again_as_it_is(kind, settings, tmp_path):
    model, images = small(kind, **settings), torch.randn(2, 3, 96, 96)
    model.set_input_size(96)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(images), model(images))


@pytest.mark.parametrize("settings", [{"positions": "interpolated"}, {"pos_embed": "learn"}], ids=["places", "table"])
def test_what_timm_saved_sees_images_of_another_shape_as_the_trained_model_does(kind, settings, tmp_path):
    """4 x 16 patches are as many as 8 x 8; and what is usual, of tokens as of places, is that of training."""
    model, images = small(kind, **settings), torch.randn(2, 3, 32, 128)
    timm.models.save_for_hf(model, tmp_path)
    model.set_input_size((32, 128))
    first = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(32, 128)).eval()
    torch.testing.assert_close(first(images), model(images))
    timm.models.save_for_hf(model, tmp_path)
    second = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(second(images), model(images))


def test_what_timm_saved_keeps_what_was_switched(kind, tmp_path):
    model, images = small(kind, position_scale=2.0, positions="ntk"), torch.randn(2, 3, 64, 64)
    before = model(images)
    set_positions(model, PositionSettings("leaky_rerope", base=50.0, window=2.0))
    set_normaliser(model, NormaliserSettings("softmax", length=5, log_n_at_test=True))
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    torch.testing.assert_close(again(images), model(images))
    assert not torch.allclose(before, model(images))


def test_a_table_of_a_longer_image_is_resampled_from_its_own_grid(tmp_path):
    """4 x 16 patches are as many as 8 x 8, and 64 of any shape look like a square."""
    settings = {"pos_embed": "learn", "normaliser": "softmax"}
    model, images = small("gau", **settings, img_size=(32, 128)), torch.randn(2, 3, 64, 64)
    nn.init.normal_(model.position_table.weight)
    timm.models.save_for_hf(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=64).eval()
    model.set_input_size(64)
    torch.testing.assert_close(again(images), model(images))


def test_whatever_stands_in_padding_stays_there(kind):
    model, valid = small(kind), (torch.arange(10) < 6).expand(2, -1)
    patches, visible = torch.randn(2, 10, 3, 8, 8), torch.arange(10).expand(2, -1)
    expected = model.forward_features(patches, visible=visible, valid=valid)[valid]
    patches[:, 6:] = math.nan
    torch.testing.assert_close(model.forward_features(patches, visible=visible, valid=valid)[valid], expected)


def test_models_are_made_where_and_of_what_timm_says(kind):
    model = small(kind, device="meta", dtype=torch.float64, in_chans=1)
    assert {(p.device.type, p.dtype) for p in model.parameters()} == {("meta", torch.float64)}
    assert model.in_chans == 1


def test_weights_are_loaded_into_a_model_of_the_meta_device(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    with torch.device("meta"):
        empty = small(kind)
    empty.to_empty(device="cpu").load_state_dict(model.state_dict())
    for module in empty.modules():  # as timm does after loading
        if hasattr(module, "init_non_persistent_buffers"):
            module.init_non_persistent_buffers()
    torch.testing.assert_close(empty(images), model(images))


def test_far_sums_of_many_tokens_stay_in_the_range_of_float16():
    """4,096 values of 4 and keys of silu(4.1), 4.03: their sum is 66,079 before it is a mean."""
    model = small("flash", img_size=512, chunk=8, depth=1, norm_place="pre")
    unit = next(module for module in model.modules() if hasattr(module, "gate_value_z"))
    value, z = torch.full((1, 64, 64, unit.apart[0]), 4.0), torch.full((1, 64, 64, 16), 4.1)
    places = torch.stack([torch.arange(4096) // 64, torch.arange(4096) % 64], dim=-1)[None].float()
    where = model.locate(places, None, (64, 64), True)
    with torch.no_grad():
        expected = unit.attend(value, z, where)
        found = unit.half().attend(value.half(), z.half(), where)
    torch.testing.assert_close(found.float(), expected, rtol=2e-2, atol=2e-2)
