"""MAE: the encoder pays for and sees the visible patches alone, and the loss is the paper's."""

import pytest
import torch
from timm.models.vision_transformer import Block
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from heatssl import objectives
from heatssl.backbones import create_backbone, encode_visible
from heatssl.errors import UserError

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
DECODER = {"decoder_width": 32, "decoder_depth": 1, "decoder_heads": 4}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 32, **settings):
    torch.manual_seed(0)
    backbone = create_backbone(name, size, **(TINY if name.startswith("vit") else {}))
    return objectives.create({"name": "mae"} | DECODER | settings, backbone, size)


def test_the_mask_is_random_for_each_image_and_hides_the_right_share():
    objective = tiny()
    visible, hidden = objective.split(torch.zeros(500, 3, 32, 32))
    assert (visible.shape, hidden.shape) == ((500, 4), (500, 12))
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(16).expand(500, -1))
    assert torch.bincount(visible.flatten(), minlength=16).min() > 80, "125 expected at each place"
    assert len({tuple(sorted(row)) for row in visible.tolist()}) > 300
    torch.manual_seed(3)
    one = objective.split(torch.zeros(4, 3, 32, 32))[0]
    torch.manual_seed(3)
    assert torch.equal(one, objective.split(torch.zeros(4, 3, 32, 32))[0]), "a resumed run must meet the same masks"


@pytest.mark.parametrize("target", ["normalised", "plain"])
def test_loss_is_that_of_its_formula(target):
    """A loop over hidden patches, with a decoder that puts tokens back in place first, as the paper tells it."""
    objective = tiny(target=target).eval()
    images = torch.randn(3, 3, 32, 32)
    torch.manual_seed(1)
    loss = objective(images).loss
    torch.manual_seed(1)
    visible, hidden = objective.split(images)
    tokens = objective.enter(encode_visible(objective.backbone, images, visible))
    errors = []
    for b in range(3):
        whole = objective.mask_token[0].repeat(16, 1)
        whole[visible[b]] = tokens[b]
        painted = objective.leave(objective.blocks((whole + objective.positions)[None]))[0]
        for k in hidden[b].tolist():
            row, column = divmod(k, 4)
            patch = images[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
            if target == "normalised":
                patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append((painted[k] - patch).square().mean())
    assert len(errors) == 36
    assert loss.item() == pytest.approx(torch.stack(errors).mean().item(), rel=1e-5)


def test_hidden_pixels_reach_the_loss_only_as_target():
    objective = tiny(target="plain").eval()
    images = torch.randn(4, 3, 32, 32)

    def maps(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        return objective.maps(pictures)

    mask = maps(images)["visible_mask"][:, None]
    assert mask.float().mean() == 0.25
    changed = torch.where(mask, images, torch.randn_like(images))
    assert torch.equal(maps(images)["reconstruction"], maps(changed)["reconstruction"])
    assert torch.equal(maps(images)["visible"], images * mask)


def test_pictures_of_normalised_patches_have_their_own_mean_and_contrast():
    objective = tiny()
    images = torch.randn(4, 3, 32, 32) * 3 + 5
    torch.nn.init.zeros_(objective.leave.weight)  # paints the mean of each patch
    maps = objective.maps(images)
    patch_means = torch.nn.functional.avg_pool2d(images.mean(1), 8).repeat_interleave(8, 1).repeat_interleave(8, 2)
    expected = torch.where(maps["visible_mask"][:, None], images, patch_means[:, None])
    assert torch.allclose(maps["reconstruction"], expected, atol=1e-4)


def test_the_encoder_costs_what_the_visible_tokens_cost():
    size, width, depth = 64, 48, 2
    objective = tiny(size=size).eval()
    images = torch.randn(2, 3, size, size)
    visible = objective.split(images)[0]

    def flops(run) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            run()
        return counter.get_total_flops()

    tokens = 16 + 1  # a quarter of 64, and the class token
    per_token = 2 * 12 * width**2 * depth
    encoder = 2 * (tokens * per_token + 2 * 2 * tokens**2 * width * depth + 16 * 2 * 3 * 8**2 * width)
    assert flops(lambda: encode_visible(objective.backbone, images, visible)) == encoder
    wide, every = 32, 64
    block = every * 2 * 12 * wide**2 + 2 * 2 * every**2 * wide
    decoder = 2 * (16 * 2 * width * wide + block + 48 * 2 * wide * 3 * 8**2)
    assert flops(lambda: objective(images)) == encoder + decoder


def test_the_decoder_is_the_papers_by_default():
    objective = objectives.create({"name": "mae"}, create_backbone("vit_tiny_patch16_224", 32, depth=1), 32)
    blocks = [block for block in objective.blocks if isinstance(block, Block)]
    assert (len(blocks), blocks[0].attn.num_heads, objective.leave.in_features) == (8, 16, 512)
    assert objective.visible == 1


def test_it_learns_to_paint_with_the_colour_of_what_it_sees():
    objective = tiny(target="plain")
    images = torch.randn(8, 3, 1, 1).expand(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=1e-2)
    for _ in range(20):
        loss = objective(images).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.4 * images.var(dim=0).mean(), "an encoder that says nothing leaves all of the variance"
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"name": "test_resnet", "size": 64}, "choose a vit"),
        ({"mask_ratio": 1.0}, "leaves 0 of 16"),
        ({"mask_ratio": 0.0}, "leaves 16 of 16"),
        ({"decoder_heads": 5}, "multiple"),
        ({"decoder_depth": 0}, "at least 1"),
        ({"target": "pixels"}, "normalised"),
    ],
)
def test_bad_settings_name_the_fix(settings, fix):
    with pytest.raises(UserError, match=fix):
        tiny(**settings)


@pytest.mark.parametrize("depth", [1, 3])
def test_the_decoder_is_lightlys_on_the_same_weights(depth):
    """Mask tokens in their places, positions added, blocks, norm: as lightly's decoder does it for whole images."""
    modules = pytest.importorskip("lightly.models.modules")
    objective = tiny(decoder_depth=depth).eval()
    theirs = modules.MaskedVisionTransformerDecoderTIMM(
        16, 32, depth, 4, num_prefix_tokens=0, norm_layer=torch.nn.LayerNorm
    ).eval()
    theirs.blocks.load_state_dict(objective.blocks[:-1].state_dict())
    theirs.norm.load_state_dict(objective.blocks[-1].state_dict())
    theirs.mask_token.data.copy_(objective.mask_token)
    theirs.pos_embed.data.copy_(objective.positions)
    visible, hidden = objective.split(torch.zeros(5, 3, 32, 32))
    features = torch.randn(5, 4, 48)
    known = objective.enter(features)
    whole = torch.randn(5, 16, 32).scatter(1, visible[..., None].expand_as(known), known)
    decoded = torch.take_along_dim(theirs(whole, idx_mask=hidden), hidden[..., None], dim=1)
    found = objective.decode(features, visible, hidden)
    torch.testing.assert_close(found, objective.leave(decoded), rtol=1e-4, atol=1e-4)
