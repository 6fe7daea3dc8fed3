"""What timm checks of its own models, for every name that heatssl registers; and what only these models do.

The names are created at their own sizes where counting is enough, and a few blocks deep where they run.
"""

import copy
import io

import onnxruntime
import pytest
import timm
import torch
from timm.layers import set_scriptable
from timm.models._features_fx import create_feature_extractor
from torch import nn

import heatssl  # noqa: F401 (registers the names)
from heatssl.backbones import (
    NormaliserSettings,
    PositionSettings,
    encode_visible,
    fade_in,
    feature_map,
    geometry,
    is_token_model,
    set_normaliser,
    set_positions,
)
from heatssl.errors import UserError

NAMES = [
    *(f"gau_{size}_{inputs}" for size in ("tiny", "small", "base") for inputs in ("patch16_224", "patch8_96")),
    *(
        f"{kind}_{size}_{inputs}"
        for kind in ("flash", "roformer_v2")
        for size in ("small", "base")
        for inputs in ("patch16_224", "patch8_96")
    ),
]
KINDS = {
    "gau": "gau_tiny_patch16_224",
    "gau_alpha": "gau_tiny_patch16_224",
    "gau_biases": "gau_tiny_patch16_224",
    "gau_table": "gau_tiny_patch16_224",
    "flash": "flash_small_patch16_224",
    "flash_chunks": "flash_small_patch16_224",
    "roformer_v2": "roformer_v2_small_patch16_224",
}
EXTRA = {
    "gau_alpha": {"norm_place": "post", "value_activation": "silu", "mixed_share": 1.0},
    "gau_biases": {"bias": True},
    "gau_table": {"pos_embed": "learn"},
    "flash_chunks": {"chunk": 3},
}
SIZE = {"img_size": 64, "patch_size": 8}  # 8 x 8 patches; chunks of 3 then leave places empty


@pytest.fixture(params=list(KINDS))
def kind(request) -> str:
    return request.param


def small(kind: str, **settings) -> nn.Module:
    torch.manual_seed(0)
    width = {"embed_dim": 48, "num_heads": 3} if kind == "roformer_v2" else {"embed_dim": 48, "key_width": 16}
    return timm.create_model(
        KINDS[kind], **{"depth": 4, "num_classes": 10} | SIZE | width | EXTRA.get(kind, {}) | settings
    ).eval()


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_the_parameters_of_the_vit_of_its_size(name):
    with torch.device("meta"):
        ours = timm.create_model(name)
        theirs = timm.create_model(f"vit_{name.split('_patch')[0].split('_')[-1]}_patch16_224")
    count, expected = (sum(parameter.numel() for parameter in model.parameters()) for model in (ours, theirs))
    assert abs(count / expected - 1) < 0.05
    config = ours.pretrained_cfg
    assert config["input_size"] == (3, *ours.patch_embed.img_size)
    assert f"{config['first_conv']}.weight" in ours.state_dict()
    assert f"{config['classifier']}.weight" in ours.state_dict()
    assert config["architecture"] == name
    assert ours.num_features == ours.embed_dim == ours.head_hidden_size


def test_the_list_of_names_is_whole():
    assert set(NAMES) == {name for kind in ("gau", "flash", "roformer_v2") for name in timm.list_models(f"{kind}_*")}


def test_forward_pools_and_heads(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    features = model.forward_features(images)
    assert features.shape == (2, 64, model.num_features)
    assert torch.equal(model(images), model.forward_head(features))
    assert model(images).shape == (2, 10)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.num_features)
    model.reset_classifier(0)
    assert torch.equal(model(images), features.mean(dim=1))
    model.reset_classifier(0, "")
    assert torch.equal(model(images), features)
    model.reset_classifier(7, "avg")
    assert model(images).shape == (2, 7)
    assert model.get_classifier().out_features == 7
    with pytest.raises(ValueError, match="avg or empty"):
        model.reset_classifier(7, "token")
    assert small(kind, num_classes=0)(images).shape == (2, model.num_features)


def test_every_parameter_gets_a_gradient(kind):
    model = small(kind, drop_path_rate=0.1, proj_drop_rate=0.1, drop_rate=0.1).train()
    model(torch.randn(2, 3, 64, 64)).square().mean().backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not missing
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


def test_features_only_and_intermediates(kind):
    images = torch.randn(2, 3, 64, 64)
    model = small(kind)
    final, found = model.forward_intermediates(images, indices=[1, 3])
    assert torch.allclose(final, model.forward_features(images))
    assert [features.shape for features in found] == [(2, 48, 8, 8)] * 2
    (last,) = model.forward_intermediates(images, indices=1, norm=True, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(last, final)
    named = model.forward_intermediates(images, output_dict=True)
    assert set(named) == {"image_features", "image_intermediates"}
    assert len(named["image_intermediates"]) == 4
    early = model.forward_intermediates(images, indices=[0], stop_early=True, intermediates_only=True)
    torch.testing.assert_close(early[0], model.forward_intermediates(images, indices=[0])[1][0])
    torch.testing.assert_close(model.get_intermediate_layers(images, [1, 3], reshape=True), found)
    torch.testing.assert_close(model.get_intermediate_layers(images, norm=True), [last])
    extractor = small(kind, features_only=True, out_indices=(1, 3))
    assert extractor.feature_info.channels() == [48, 48]
    assert extractor.feature_info.reduction() == [8, 8]
    torch.testing.assert_close(extractor(images)[0], found[0])
    with pytest.raises(ValueError, match="NCHW or NLC"):
        model.forward_intermediates(images, output_fmt="NHWC")
    assert model.prune_intermediate_layers(2, prune_norm=True) == [2, 3]


def test_gradient_checkpointing_changes_nothing(kind):
    images = torch.randn(2, 3, 64, 64)
    gradients = []
    for enable in (False, True):
        model = small(kind).train()
        model.set_grad_checkpointing(enable)
        model(images).square().mean().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in model.parameters()]))
    torch.testing.assert_close(*gradients)


def test_scripts_traces_and_reloads(kind):
    images = torch.randn(2, 3, 64, 64)
    model = small(kind)
    expected = model(images)
    with set_scriptable(True):
        scripted = torch.jit.script(small(kind))
    torch.testing.assert_close(scripted(images), expected)
    nodes = create_feature_extractor(small(kind), ["head"])
    torch.testing.assert_close(nodes(images)["head"], expected)
    nodes.train()(images)["head"].square().mean().backward()
    assert all(parameter.grad is not None for parameter in nodes.parameters())
    with set_scriptable(True):
        scripted = torch.jit.script(create_feature_extractor(small(kind), ["head"]))
    torch.testing.assert_close(scripted(images)["head"], expected)
    again = small(kind)
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    torch.testing.assert_close(again(images), expected)


@pytest.mark.slow
def test_compiles_without_a_break(kind):
    images = torch.randn(2, 3, 64, 64)
    model = small(kind)
    torch.testing.assert_close(torch.compile(model, fullgraph=True)(images), model(images), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_onnx_gives_the_same_numbers(kind):
    images = torch.randn(1, 3, 64, 64)
    model, file = small(kind), io.BytesIO()
    torch.onnx.export(model, (images,), file, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(file.getvalue())
    (found,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), atol=1e-4, rtol=1e-3)


def test_other_image_sizes(kind):
    images = torch.randn(1, 3, 96, 80)
    with pytest.raises(AssertionError, match="height"):
        small(kind)(images)
    model = small(kind, dynamic_img_size=True)
    assert model.forward_features(images).shape == (1, 120, 48)
    assert feature_map(small(kind), images).shape == (1, 48, 12, 10), "as for timm's ViTs, without being asked"
    torch.testing.assert_close(feature_map(small(kind), images).flatten(2).mT, model.forward_features(images))
    assert geometry(small(kind), 64).quarter() == (4, 4)


def test_all_patches_in_any_order_are_the_whole_image(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    order = torch.stack([torch.randperm(64) for _ in range(2)])
    whole = model.forward_features(images)
    assert is_token_model(model)
    found = encode_visible(model, images, order)
    torch.testing.assert_close(found, torch.take_along_dim(whole, order[..., None], dim=1), atol=1e-5, rtol=1e-4)


def test_hidden_patches_are_not_looked_at(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    visible = torch.stack([torch.randperm(64)[:13] for _ in range(2)])
    before = model.forward_features(images, visible=visible)
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, visible, False).view(2, 1, 8, 8)
    pixels = hidden.repeat_interleave(8, 2).repeat_interleave(8, 3)
    changed = torch.where(pixels, torch.randn_like(images), images)
    torch.testing.assert_close(model.forward_features(changed, visible=visible), before)
    elsewhere = (visible + 9) % 64
    assert not torch.allclose(model.forward_features(images, visible=elsewhere), before)


def test_padding_of_visible_sets_changes_nothing(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    visible = torch.stack([torch.randperm(64)[:12] for _ in range(2)])
    expected = model.forward_features(images, visible=visible)
    # Padding repeats a patch that has its place already, as callers would do.
    padded = torch.cat([visible, visible[:, :1].expand(-1, 52)], dim=1)  # as long as the whole grid
    valid = torch.arange(64).expand(2, -1) < 12
    found = model.forward_features(images, visible=padded, valid=valid)
    torch.testing.assert_close(found[:, :12], expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(encode_visible(model, images, padded, valid)[:, :12], found[:, :12])
    pooled = model.forward_head(found.masked_fill(~valid[..., None], torch.nan), valid=valid)
    torch.testing.assert_close(pooled, model.forward_head(expected), atol=1e-5, rtol=1e-4)
    assert not model.forward_head(found, pre_logits=True, valid=torch.zeros_like(valid)).any()


@pytest.mark.parametrize("kind", ["gau", "gau_alpha", "roformer_v2"])  # chunks of flash_* lie in the image
def test_a_quarter_is_seen_the_same_wherever_it_lies(kind):
    """Rotary positions know offsets only: a picture moved by whole patches has the same features."""
    model, quarter = small(kind), torch.randn(1, 3, 32, 32)
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, :32, :32], images[1, :, 24:56, 16:48] = quarter, quarter
    block = (torch.arange(4)[:, None] * 8 + torch.arange(4)).flatten()
    first, second = model.forward_features(images, visible=torch.stack([block, block + 3 * 8 + 2]))
    torch.testing.assert_close(first, second, atol=1e-5, rtol=1e-4)


def test_a_position_table_is_read_at_the_true_places_and_resampled_as_timm_does():
    """What a table adds must not depend on which patches are shown, nor be decayed."""
    model, images = small("gau", pos_embed="learn", depth=0, img_size=32), torch.randn(1, 3, 32, 32)
    table = model.position_table.weight
    patches = model.norm(model.norm_in(model.patch_embed(images) + table))
    torch.testing.assert_close(model.forward_features(images), patches)
    torch.testing.assert_close(encode_visible(model, images, torch.tensor([[9, 2]])), patches[:, [9, 2]])
    assert model.no_weight_decay() == {"position_table.weight"}
    assert small("gau", depth=1).no_weight_decay() == {"blocks.0.layer.query_key.scale"}  # a matrix only in its shape
    larger = timm.layers.resample_abs_pos_embed(table, [6, 4], [4, 4], num_prefix_tokens=0)
    torch.testing.assert_close(model.position_table((6, 4)), larger)


def test_weights_of_another_size_are_loaded_as_timm_loads_those_of_its_vits(tmp_path):
    """Made at the new size with the old length, a model computes what the old one does when it is told the size."""
    settings, images = {"pos_embed": "learn", "normaliser": "relu2_fixed"}, torch.randn(1, 3, 96, 96)
    trained, path = small("gau", **settings), tmp_path / "weights.pth"
    torch.save(trained.state_dict(), path)
    loading = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "img_size": 96}
    trained.set_input_size(96)
    again = small("gau", **settings, **loading, length=64)
    torch.testing.assert_close(again.forward_features(images), trained.forward_features(images))
    with pytest.raises(RuntimeError, match="size mismatch for position_table"):
        small("gau", **settings, **loading | {"img_size": (64, 32)}).load_state_dict(torch.load(path))


def test_positions_and_normaliser_are_switched_on_a_trained_model(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    before, usual = model(images), model.normaliser.settings
    set_positions(model, PositionSettings("rerope", window=1.0))
    rerope = model(images)
    assert not torch.allclose(rerope, before)
    torch.testing.assert_close(rerope, small(kind, positions="rerope", position_window=1.0)(images))
    set_positions(model, PositionSettings())
    set_normaliser(model, NormaliserSettings("relu2", 7))
    assert not torch.allclose(model(images), before)
    torch.testing.assert_close(model(images), small(kind, normaliser="relu2")(images))
    set_normaliser(model, usual)
    torch.testing.assert_close(model(images), before)


def test_interpolated_positions_follow_the_grid_that_is_met(kind):
    """As a ViT's table does, each axis by itself; on the grid of training they are rope."""
    rope, model = small(kind, dynamic_img_size=True), small(kind, dynamic_img_size=True, positions="interpolated")
    images, larger, longer = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 192, 192), torch.randn(2, 3, 64, 96)
    torch.testing.assert_close(model(images), rope(images))
    torch.testing.assert_close(torch.jit.script(model)(longer), model(longer))
    order = torch.randperm(8 * 12).expand(2, -1)
    shuffled = model.forward_features(longer, visible=order)
    torch.testing.assert_close(shuffled, model.forward_features(longer).gather(1, order[..., None].expand(-1, -1, 48)))
    found = model(larger)
    assert not torch.allclose(found, rope(larger), atol=1e-4)
    set_positions(rope, PositionSettings("interpolated", scale=3.0))
    torch.testing.assert_close(found, rope(larger))
    set_positions(rope, PositionSettings("interpolated"))
    torch.testing.assert_close(found, rope(larger))
    model.set_input_size(192)
    torch.testing.assert_close(model(larger), found)


def test_the_input_size_is_changed_without_touching_weights(kind):
    model, images = small(kind), torch.randn(2, 3, 96, 64)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(AssertionError, match="height"):
        model(images)
    model.set_input_size((96, 64))
    torch.testing.assert_close(model(images), small(kind, dynamic_img_size=True)(images))
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_layers_fade_in_and_the_share_is_kept_with_the_weights(kind):
    model, images = small(kind), torch.randn(2, 3, 64, 64)
    if kind not in ("gau_alpha", "roformer_v2"):
        with pytest.raises(UserError, match="no post-norm layer to fade in: set it to 0"):
            fade_in(model, 0.5)
        return
    whole = model(images)
    fade_in(model, 0.0)
    embedded = model.norm_in(model.embed(images, (8, 8)))
    torch.testing.assert_close(model.forward_features(images), embedded, atol=1e-4, rtol=1e-4)
    fade_in(model, 0.5)
    half = model(images)
    assert not torch.allclose(half, whole)
    again = small(kind)
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(images), half)


@pytest.mark.parametrize("normaliser", ["relu2", "relu2_fixed", "softmax", "softmax_plus"])
def test_bfloat16_stays_near(kind, normaliser):
    model, images = small(kind, normaliser=normaliser), torch.randn(2, 3, 64, 64)
    expected = model.forward_features(images)
    streams = []
    handle = model.blocks[1].register_forward_hook(lambda _block, _inputs, output: streams.append(output.dtype))
    with torch.autocast("cpu", torch.bfloat16):
        found = model.forward_features(images)
    handle.remove()
    assert {found.dtype, *streams} == {torch.float32}, "what layers add up is not rounded, as a ViT's is not"
    assert (found - expected).square().mean().sqrt() < 0.05 * expected.square().mean().sqrt()


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gau_tiny_patch16_224", {"normaliser": "max"}, "unknown normaliser 'max'"),
        ("gau_tiny_patch16_224", {"positions": "absolute"}, "unknown positions 'absolute'"),
        ("gau_tiny_patch16_224", {"pos_embed": "sincos"}, "pos_embed must be none or learn"),
        ("gau_tiny_patch16_224", {"norm_place": "middle"}, "norm_place must be pre or post"),
        ("gau_tiny_patch16_224", {"value_activation": "relu"}, "value_activation must be silu or none"),
        ("gau_tiny_patch16_224", {"mixed_share": 0.0}, "mixed_share=0.0 mixes 0 of 384 channels"),
        ("gau_tiny_patch16_224", {"global_pool": "token"}, "global_pool must be avg or empty, not 'token'"),
        ("gau_tiny_patch16_224", {"key_width": 6}, "4 divides"),
        ("gau_tiny_patch16_224", {"length": 0}, "length must be at least 1, not 0"),
        ("gau_tiny_patch16_224", {"depth": -1}, "depth must not be negative, and is -1"),
        ("gau_tiny_patch16_224", {"embed_dim": 0}, "embed_dim must be at least 1, not 0"),
        ("gau_tiny_patch16_224", {"patch_size": (16, 0)}, "patch_size must be at least 1, not 0"),
        ("roformer_v2_small_patch16_224", {"num_heads": 0}, "num_heads must be at least 1, not 0"),
        ("flash_small_patch16_224", {"chunk": 0}, "at least 1 patch"),
        ("roformer_v2_small_patch16_224", {"num_heads": 5}, "do not divide"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model(name, **{"depth": 1} | settings)
