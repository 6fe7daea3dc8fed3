"""Heat completion: the encoder sees and pays for visible patches alone; heat does the rest."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.errors import UserError
from heatssl.objectives.masks import random_blocks, random_cells, random_parts, random_scales

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
CPU = torch.device("cpu")


def tiny(**settings):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **TINY)
    return objectives.create({"name": "heat_completion", "groups": 2, "painter_width": 32} | settings, backbone, 32)


def test_random_parts_of_an_image_do_not_overlap():
    visible, hidden = random_parts(200, 16, visible=4, parts=3, device=CPU)
    assert (visible.shape, hidden.shape) == ((600, 4), (600, 12))
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(16).expand(600, -1))
    of_one_image = visible.unflatten(0, (3, 200)).transpose(0, 1).flatten(1)
    assert all(len(set(row)) == 12 for row in of_one_image.tolist())
    assert torch.bincount(visible.flatten(), minlength=16).min() > 100, "150 expected at each place"


def test_blocks_are_rectangles_at_any_place():
    visible, hidden = random_blocks(300, (4, 6), (2, 3), parts=2, device=CPU)
    assert (visible.shape, hidden.shape) == ((600, 6), (600, 18))
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(24).expand(600, -1))
    rows, columns = visible // 6, visible % 6
    assert ((rows.amax(1) - rows.amin(1)) == 1).all()
    assert ((columns.amax(1) - columns.amin(1)) == 2).all()
    assert len(set(visible[:, 0].tolist())) == 12  # 3 x 4 places, off the corners too
    first = (hidden[:, 0][:, None] == torch.arange(24)).float().mean(0)
    assert first[0] > 0.01, "hidden patches come in random order, so that a share of them is a random one"


def test_scales_are_patches_of_rectangles_of_any_size():
    visible, hidden = random_scales(500, (6, 8), visible=6, parts=2, device=CPU)
    assert (visible.shape, hidden.shape) == ((1000, 6), (1000, 42))
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(48).expand(1000, -1))
    rows, columns = visible // 8, visible % 8
    height, width = rows.amax(1) - rows.amin(1) + 1, columns.amax(1) - columns.amin(1) + 1
    assert (height * width).min() == 6, "none but its own patches, where the rectangle is the smallest"
    assert (height.max(), width.max()) == (6, 8)
    assert torch.bincount(visible.flatten(), minlength=48).min() > 15, "corners are seldom reached, but are"
    first = (hidden[:, 0][:, None] == torch.arange(48)).float().mean(0)
    assert first.min() > 0.003, "hidden patches come in random order"


def test_cells_are_several_blocks_and_those_of_an_image_do_not_overlap():
    visible, hidden = random_cells(300, (4, 6), 2, visible=2, parts=3, device=CPU)
    assert (visible.shape, hidden.shape) == ((900, 8), (900, 16))
    assert torch.equal(torch.cat([visible, hidden], 1).sort(1).values, torch.arange(24).expand(900, -1))
    blocks = visible.unflatten(1, (2, 4))
    corner = blocks[..., :1]
    assert torch.equal(blocks, corner + torch.tensor([0, 1, 6, 7]))
    assert set(corner.flatten().tolist()) == {0, 2, 4, 12, 14, 16}
    of_one_image = visible.unflatten(0, (3, 300)).transpose(0, 1).flatten(1)
    assert all(len(set(row)) == 24 for row in of_one_image.tolist())
    first = (hidden[:, 0][:, None] == torch.arange(24)).float().mean(0)
    assert first.min() > 0.02, "hidden patches come in random order, not block by block"


@pytest.mark.parametrize("flow", ["kernel", "steady", "correlated"])
@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("mask", ["random", "block", "blocks", "scales"])
def test_hidden_pixels_reach_the_loss_only_as_target(flow, transport, mask):
    objective = tiny(flow=flow, transport=transport, mask=mask, target="plain").eval()
    images = torch.randn(4, 3, 32, 32)

    def maps(pictures: torch.Tensor) -> dict[str, torch.Tensor]:
        torch.manual_seed(2)
        return objective.maps(pictures)

    shown = maps(images)
    mask = shown["visible_mask"][:, None]
    assert mask.float().mean() == 0.25
    changed = torch.where(mask, images, torch.randn_like(images))
    for name in ("reconstruction", "from_rest"):
        assert torch.equal(shown[name], maps(changed)[name])
    assert torch.equal(shown["visible"], images * mask)
    assert shown["law_residual"].shape == (4, 4, 4)


def test_a_correlated_flow_at_angle_zero_is_the_steady_one_and_learns_to_turn():
    steady, correlated = tiny(flow="steady"), tiny(flow="correlated")
    images = torch.randn(4, 3, 32, 32)
    losses = []
    for objective in (steady, correlated):
        torch.manual_seed(3)
        losses.append(objective(images).loss)
    torch.testing.assert_close(*losses)
    losses[1].backward()
    assert correlated.raw_angle.grad.abs().min() > 0
    with torch.no_grad():
        correlated.raw_angle.fill_(20.0)
        torch.manual_seed(3)
        assert torch.isfinite(correlated(images).loss), "as near to a wave equation as it comes"


def test_the_steady_field_obeys_laplace_in_its_frame_wherever_it_is_hidden():
    objective = tiny(flow="steady")
    torch.nn.init.normal_(objective.transport.raw_decay)
    maps = objective.maps(torch.randn(6, 3, 32, 32))
    hidden = ~maps["visible_mask"][:, ::8, ::8]
    assert maps["law_residual"][hidden].max() < 1e-9
    assert maps["law_residual"][~hidden].min() > 1e-6


@pytest.mark.parametrize("target", ["normalised", "plain"])
def test_loss_is_that_of_its_formula(target):
    """A loop over painted patches, each a mean of turned visible values with the heat kernel's weights."""
    objective = tiny(target=target, predicted_ratio=0.5, groups=1, rest_weight=0.5).eval()
    images = torch.randn(2, 3, 32, 32)
    torch.manual_seed(1)
    loss, logs, _ = objective(images)
    torch.manual_seed(1)
    visible, hidden = objective.split(images)
    tokens = objectives.heat_completion.encode_visible(objective.backbone, images, visible)
    values = objective.to_field(tokens)
    time, rotation = objective.log_flow.exp(), objective.transport.rotation
    errors, from_rest = [], []

    def patch_of(b: int, k: int) -> torch.Tensor:
        row, column = divmod(k, 4)
        patch = images[b, :, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8].flatten()
        return (patch - patch.mean()) / (patch.var() + 1e-6).sqrt() if target == "normalised" else patch

    for b in range(2):
        for k in hidden[b, :6].tolist():
            total, weights = torch.zeros(24, dtype=torch.complex64), 0.0
            for value, q in zip(values[b], visible[b].tolist(), strict=True):
                dy, dx = k // 4 - q // 4, k % 4 - q % 4
                weight = torch.exp(-(dx * dx + dy * dy) / (4 * time))
                turn = torch.exp(1j * (dx * rotation[0] + dy * rotation[1]))
                total, weights = total + weight * turn * torch.complex(value[:24], value[24:]), weights + weight
            painted = objective.painter(torch.cat([total.real, total.imag]) / weights)
            errors.append((painted - patch_of(b, k)).square().mean())
        rest, whole = objective.from_rest.to_rest(tokens[b].mean(dim=0)), objective.from_rest.transport.rotation
        for k in range(16):
            turn = torch.exp(1j * ((k % 4 - 1.5) * whole[0] + (k // 4 - 1.5) * whole[1]))
            wave = turn * torch.complex(rest[:24], rest[24:])
            painted = objective.from_rest.painter(torch.cat([wave.real, wave.imag]))
            from_rest.append((painted - patch_of(b, k)).square().mean())
    assert (len(errors), len(from_rest)) == (12, 32)
    hidden_loss, rest_loss = (torch.stack(some).mean().item() for some in (errors, from_rest))
    assert logs["loss/hidden"].item() == pytest.approx(hidden_loss, rel=1e-4)
    assert logs["loss/rest"].item() == pytest.approx(rest_loss, rel=1e-4)
    assert loss.item() == pytest.approx(hidden_loss + 0.5 * rest_loss, rel=1e-4)


def test_the_encoder_pays_for_visible_patches_alone():
    def operations(**settings) -> int:
        objective = tiny(rest_weight=0.0, **settings)
        with FlopCounterMode(display=False) as counter:
            objective(torch.randn(4, 3, 32, 32))
        return counter.get_total_flops()

    quarter, half = operations(), operations(visible_ratio=0.5)
    blocks = 2 * 4 * 4 * 2 * 12 * 48**2  # two a multiply-add, images, visible patches, depth, 12 d^2
    assert half - quarter > 0.8 * blocks
    assert quarter < 2 * blocks
    assert operations(predicted_ratio=0.5) < quarter
    assert operations(parts=4) == pytest.approx(4 * quarter, rel=0.01)


def test_everything_learns():
    objective = tiny(parts=2)
    objective(torch.randn(4, 3, 32, 32)).loss.backward()
    assert objective.log_flow.grad.abs().min() > 0
    assert objective.transport.rotation.grad.abs().max() > 0
    assert objective.transport.raw_decay.grad.abs().max() > 0
    assert objective.backbone.blocks[0].attn.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask": "rnadom"}, "unknown mask 'rnadom': did you mean 'random'. choose one of random, block"),
        ({"flow": "wave"}, "choose one of kernel, steady"),
        ({"visible_ratio": 0.0}, "choose a visible_ratio"),
        ({"predicted_ratio": 0.0}, "predicted_ratio"),
        ({"parts": 5}, "do not fit into 16"),
        ({"parts": 5, "mask": "blocks"}, "do not fit into 16"),
        ({"visible_ratio": 0.2, "mask": "blocks"}, "0 of 16 patches visible"),
        ({"groups": 5}, "groups"),
        ({"rest_law": "laplace"}, "commuting, table, mlp, free, copy"),
        ({"rest_weight": -1.0}, "0 or more"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_a_convolutional_backbone_is_refused():
    with pytest.raises(UserError, match="objective=qb_heat"):
        objectives.create({"name": "heat_completion"}, create_backbone("test_resnet", 64), 64)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_what_it_tells_of_its_pictures_is_what_there_is(weight):
    objective = tiny(rest_weight=weight)
    assert ("from_rest" in objective.maps(torch.randn(2, 3, 32, 32))) == ("mean" in objective.story.explanation)


def test_blocks_that_do_not_tile_the_grid_are_named():
    backbone = create_backbone("vit_tiny_patch16_224", 40, **TINY)
    with pytest.raises(UserError, match=r"blocks of 2 x 2 do not tile \(5, 5\): choose mask=random"):
        objectives.create({"name": "heat_completion", "mask": "blocks"}, backbone, 40)
