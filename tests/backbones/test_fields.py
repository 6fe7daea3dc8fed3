"""Outputs of layers as fields: a wrong guess of what is a side gives maps that only look like ones."""

from types import SimpleNamespace

import pytest
import timm
import torch

from heatssl.backbones import as_field, create_backbone, feature_map, pooled_features
from heatssl.errors import UserError
from heatssl.export import load_backbone

CHANNELS_FIRST, CHANNELS_LAST = SimpleNamespace(), SimpleNamespace(output_fmt="NHWC")


@pytest.mark.parametrize("model", [CHANNELS_FIRST, CHANNELS_LAST])
@pytest.mark.parametrize(("height", "width", "rows", "columns"), [(64, 64, 4, 4), (100, 70, 4, 3), (32, 96, 1, 3)])
def test_channels_are_where_the_shape_of_the_image_is_not(model, height, width, rows, columns):
    """Inside a model that ends in (B, C, h, w) some layers return (B, h, w, C): it went by the end alone."""
    images = torch.zeros(2, 3, height, width)
    field = torch.randn(2, 24, rows, columns)
    assert torch.equal(as_field(model, field, images), field)
    assert torch.equal(as_field(model, field.permute(0, 2, 3, 1), images), field)


def test_a_cube_is_laid_out_as_the_models_own_map():
    cube = torch.randn(1, 8, 8, 8)
    images = torch.zeros(1, 3, 64, 64)
    assert torch.equal(as_field(CHANNELS_FIRST, cube, images), cube)
    assert torch.equal(as_field(CHANNELS_LAST, cube, images), cube.permute(0, 3, 1, 2))


@pytest.mark.parametrize("shape", [(2, 9, 64, 5), (8, 16, 24), (2, 15, 24), (2, 24)])
def test_what_is_no_grid_of_the_image_is_refused(shape):
    """The second are windows: more of them than images."""
    with pytest.raises(UserError, match="no grid: choose another layer"):
        as_field(CHANNELS_FIRST, torch.zeros(shape), torch.zeros(2, 3, 64, 64))


def test_an_inner_layer_of_a_convnext_has_the_grid_of_its_stage():
    torch.manual_seed(0)
    model = create_backbone("test_convnext", 160).eval()
    found = {}
    for name in ("stages.3.blocks.0.norm", "stages.3.blocks.0.mlp", "stages.3"):
        handle = model.get_submodule(name).register_forward_hook(lambda *call, n=name: found.update({n: call[-1]}))
        images = torch.randn(1, 3, 160, 160)
        model(images)
        handle.remove()
        assert as_field(model, found[name], images).shape[2:] == (5, 5), name


@pytest.mark.parametrize(
    ("name", "side"),
    [
        ("mixer_s32_224", 7),  # tokens, no patch size to be asked
        ("levit_128s", 4),
        ("hiera_tiny_224", 7),
        ("xcit_nano_12_p16_224", 14),
        ("pit_ti_224", 7),  # the class token alone
        ("coat_tiny", 7),  # several maps
    ],
)
def test_models_of_timm_whose_end_is_no_plain_map_have_one(name, side):
    torch.manual_seed(0)
    model = create_backbone(name, 224).eval()
    images = torch.randn(1, 3, 224, 224)
    field = feature_map(model, images)
    assert field.shape[2:] == (side, side)
    assert torch.allclose(pooled_features(model, images), field.mean(dim=(2, 3)))


def test_visible_patches_are_no_smaller_grid():
    """Four of sixteen, and a class token, lie anywhere; and so do fifteen."""
    model = create_backbone("vit_tiny_patch16_224", 64, depth=1).eval()
    for tokens in (5, 4, 16):
        with pytest.raises(UserError, match="no grid"):
            as_field(model, torch.zeros(2, tokens, 192), torch.zeros(2, 3, 64, 64))


@pytest.mark.parametrize("block", [0, 3, 11])
def test_tokens_of_hiera_are_put_in_order(block):
    """Its blocks keep them by windows: as rows they would be a shuffled picture."""
    torch.manual_seed(0)
    model = timm.create_model("hiera_tiny_224", num_classes=0).eval()
    images = torch.randn(1, 3, 224, 224)
    kept = []
    handle = model.blocks[block].register_forward_hook(lambda *call: kept.append(call[-1]))
    wanted = model.forward_intermediates(images, indices=[block], intermediates_only=True, coarse=False)[0]
    handle.remove()
    assert torch.equal(as_field(model, kept[0], images), wanted)


def test_layers_ahead_of_the_class_token_have_none():
    model = create_backbone("cait_xxs24_224", 224, depth=1).eval()
    images = torch.zeros(1, 3, 224, 224)
    tokens = torch.randn(1, 197, 5)
    patches = tokens[:, 1:].mT.unflatten(2, (14, 14))
    assert torch.equal(as_field(model, tokens, images), patches)
    assert torch.equal(as_field(model, tokens[:, 1:], images), patches)


def test_a_random_model_that_cannot_be_made_is_not_told_of_weights(monkeypatch):
    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr("heatssl.export.backbone_files.create_backbone", broken)
    with pytest.raises(UserError, match=r"^test_vit cannot be created \(KeyError"):
        load_backbone("timm:test_vit?random")
