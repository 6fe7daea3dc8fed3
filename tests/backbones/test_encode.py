"""Encoding visible patches: the same numbers as timm on the whole grid, at the cost of the visible patches alone."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heatssl.backbones import (
    create_backbone,
    encode_block,
    encode_visible,
    feature_map,
    geometry,
    pooled_features,
)
from heatssl.errors import UserError

# One name per way of telling positions: absolute, absolute without class token rows, a second class token,
# registers, rotary, mixed rotary.
TOKEN_MODELS = [
    ("vit_tiny_patch16_224", {}),
    ("deit3_small_patch16_224", {}),
    ("deit_tiny_distilled_patch16_224", {}),
    ("vit_small_patch14_reg4_dinov2", {"patch_size": 16}),
    ("vit_small_patch16_dinov3", {}),
    ("vit_small_patch16_rope_mixed_224", {}),
]


def lively(name: str, **arguments) -> torch.nn.Module:
    """A random backbone whose blocks act: layer scale starts at 1e-5 in some, which would hide every error."""
    torch.manual_seed(0)
    backbone = create_backbone(name, 64, depth=2, **arguments).eval()
    with torch.no_grad():
        for key, parameter in backbone.named_parameters():
            if "gamma" in key or "ls" in key:
                parameter.fill_(1.0)
    return backbone


@pytest.mark.parametrize(("name", "arguments"), TOKEN_MODELS)
def test_all_patches_in_any_order_equal_timm(name, arguments):
    backbone = lively(name, **arguments)
    images = torch.randn(2, 3, 64, 64)
    whole = feature_map(backbone, images).flatten(2).transpose(1, 2)
    order = torch.stack([torch.randperm(16), torch.randperm(16)])
    tokens = encode_visible(backbone, images, order)
    expected = torch.gather(whole, 1, order[..., None].expand(-1, -1, whole.shape[2]))
    assert torch.allclose(tokens, expected, atol=1e-4)


@pytest.mark.parametrize(("name", "arguments"), TOKEN_MODELS)
def test_visible_patches_know_where_they_stand(name, arguments):
    """The same pixels at two places give different features: true positions, not 0 to n-1."""
    backbone = lively(name, **arguments)
    patches = torch.randn(3, 3, 16, 16)

    def encode_at(places: list[tuple[int, int]]) -> torch.Tensor:
        image = torch.zeros(1, 3, 64, 64)
        for patch, (row, column) in zip(patches, places, strict=True):
            image[0, :, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16] = patch
        return encode_visible(backbone, image, torch.tensor([[4 * row + column for row, column in places]]))

    assert not torch.allclose(encode_at([(0, 0), (0, 1), (1, 0)]), encode_at([(0, 0), (0, 3), (3, 2)]), atol=1e-4)


def test_hidden_pixels_have_no_influence():
    backbone = create_backbone("vit_tiny_patch16_224", 64, depth=2).eval()
    images = torch.randn(2, 3, 64, 64)
    changed = images.clone()
    changed[:, :, 32:] += 10
    rows, columns = torch.tensor([0, 0]), torch.tensor([0, 2])
    assert torch.equal(
        encode_block(backbone, images, rows, columns, 2, 2),
        encode_block(backbone, changed, rows, columns, 2, 2),
    )


def test_tokens_that_are_not_known_are_not_left_out_silently():
    backbone = create_backbone("vit_tiny_patch16_224", 64, depth=1)
    backbone.num_prefix_tokens = 3
    with pytest.raises(UserError, match="tokens before its patches"):
        encode_visible(backbone, torch.randn(1, 3, 64, 64), torch.tensor([[0, 5]]))


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]
)
def test_gradient_checkpointing_computes_blocks_again_and_changes_nothing(name):
    """Without it an objective that shows some of the patches would need the memory that was to be saved."""
    images, visible = torch.randn(2, 3, 64, 64), torch.tensor([[0, 5, 6], [9, 2, 3]])
    gradients, calls = [], []
    for enable in (False, True):
        backbone = lively(name).train()
        backbone.set_grad_checkpointing(enable)
        ran = []
        backbone.blocks[0].register_forward_pre_hook(lambda *_, ran=ran: ran.append(1))
        encode_visible(backbone, images, visible).square().mean().backward()
        calls.append(len(ran))
        gradients.append(torch.cat([p.grad.flatten() for p in backbone.parameters() if p.grad is not None]))
    assert calls == [1, 2]
    torch.testing.assert_close(*gradients)


def test_cost_is_that_of_the_visible_tokens():
    """A quarter of the patches costs under a quarter of the whole: attention is quadratic, the embedding linear."""
    backbone = create_backbone("vit_tiny_patch16_224", 224, depth=4, class_token=False, global_pool="avg").eval()
    images = torch.randn(1, 3, 224, 224)

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops()

    whole = flops(lambda: feature_map(backbone, images))
    zero = torch.tensor([0])
    quarter = flops(lambda: encode_block(backbone, images, zero, zero, 7, 7))
    tokens, width, depth, patch = 49, 192, 4, 3 * 16 * 16
    per_token = 2 * (12 * width**2 * depth + patch * width)
    attention = 2 * 2 * tokens**2 * width * depth
    assert quarter == tokens * per_token + attention
    assert quarter < whole / 4


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_convolutional_models_see_the_quarter_as_a_small_image(name):
    torch.manual_seed(0)
    backbone = create_backbone(name, 128).eval()
    grid = geometry(backbone, 128)
    assert (grid.rows, grid.columns, grid.stride, grid.prefix_tokens) == (4, 4, 32, 0)
    images = torch.randn(2, 3, 128, 128)
    block = encode_block(backbone, images, torch.tensor([0, 2]), torch.tensor([2, 0]), 2, 2)
    expected = feature_map(backbone, torch.stack([images[0, :, :64, 64:], images[1, :, 64:, :64]]))
    assert torch.allclose(block, expected)


def test_geometry_comes_from_the_model():
    backbone = create_backbone("vit_small_patch14_reg4_dinov2", 56, depth=1)
    grid = geometry(backbone, 56)
    assert (grid.rows, grid.columns, grid.stride, grid.prefix_tokens, grid.channels) == (4, 4, 14, 5, 384)
    assert grid.quarter() == (2, 2)
    assert pooled_features(backbone, torch.randn(3, 3, 56, 56)).shape == (3, 384)


def test_geometry_leaves_the_mode_as_it_was():
    backbone = create_backbone("resnet10t", 64).train()
    before = backbone.bn1.running_mean.clone() if hasattr(backbone, "bn1") else None
    geometry(backbone, 64)
    assert backbone.training
    if before is not None:
        assert torch.equal(backbone.bn1.running_mean, before)


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: create_backbone("vit_tiny_patch16_244", 64), "vit_tiny_patch16_224"),
        (lambda: create_backbone("vit_tiny_patch16_224", 8), "smaller than one"),
        (lambda: create_backbone("vit_tiny_patch16_224", 4, patch_size=8), "smaller than one patch of 8"),
        (lambda: create_backbone("vit_tiny_patch16_224", 64, depht=2), "depht"),
        (lambda: create_backbone("roformer_v2_small_patch16_224", 64, num_heads=0), "num_heads=0 .* at least 1"),
        (lambda: create_backbone("gau_tiny_patch16_224", 64, patch_size=0), "patch_size=0 .* at least 1"),
        (lambda: create_backbone("vit_tiny_patch16_224", 64, depth=-1), "depth=-1 .* at least 1"),
        (lambda: create_backbone("vit_tiny_patch16_224", 64, patch_size=[0, 8]), r"cannot be created .*=\[0, 8\]"),
        (lambda: create_backbone("gau_tiny_patch16_224", 64, length=0), "length must be at least 1"),
        (lambda: create_backbone("gau_tiny_patch16_224", 64, position_scale=float("nan")), "finite, not nan"),
        (lambda: create_backbone("gau_tiny_patch16_224", 64, trained_grid=[4]), r"rows and columns.*not \[4\]"),
        (lambda: geometry(create_backbone("vit_tiny_patch16_224", 72, depth=1), 72), "64 or 80"),
        (
            lambda: geometry(create_backbone("gau_tiny_patch16_224", 64, depth=1, patch_size=(8, 16)), 64),
            "8 x 4 patches",
        ),
        (lambda: geometry(create_backbone("vit_tiny_patch16_224", 48, depth=1), 48).quarter(), "32 or 64"),
        (
            lambda: encode_visible(
                create_backbone("resnet10t", 64), torch.randn(1, 3, 64, 64), torch.zeros(1, 1).long()
            ),
            "encode_visible encodes single patches, which ResNet cannot",
        ),
        (
            lambda: encode_visible(
                create_backbone("vit_tiny_patch16_224", 64, depth=1),
                torch.randn(1, 3, 64, 64),
                torch.zeros(1, 2).long(),
                torch.tensor([[True, False]]),
            ),
            "cannot leave padding out: .* without valid",
        ),
    ],
)
def test_bad_input_names_the_fix(call, fix):
    with pytest.raises(UserError, match=fix) as caught:
        call()
    assert "\n" not in str(caught.value)
