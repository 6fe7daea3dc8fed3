"""QB-Heat: what is hidden stays hidden, the law fills the right places, and the loss can be learned from."""

import pytest
import torch

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.errors import UserError
from heatssl.heat import relative_residual
from heatssl.objectives.objective import channel_std, rankme
from heatssl.objectives.quarter import CORNERS, corners_of_batch, random_corners
from heatssl.objectives.targets import patch_statistics, patchify, unpatchify

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 32, **settings):
    torch.manual_seed(0)
    arguments = TINY if name.startswith("vit") else {}
    return objectives.create({"name": "qb_heat", **settings}, create_backbone(name, size, **arguments), size)


def test_patchify_round_trip_and_order():
    images = torch.randn(2, 3, 8, 12)
    patches = patchify(images, 4)
    assert patches.shape == (2, 48, 2, 3)
    assert torch.equal(patches[1, :, 1, 2].view(3, 4, 4), images[1, :, 4:8, 8:12])
    assert torch.equal(unpatchify(patches, 4), images)
    mean, std = patch_statistics(patches)
    normalised = (patches - mean) / std
    assert torch.allclose(normalised.mean(1), torch.zeros(2, 2, 3), atol=1e-5)
    assert torch.allclose(normalised.std(1), torch.ones(2, 2, 3), atol=1e-3)


def test_every_corner_is_shown_and_marked():
    objective = tiny()
    images = torch.rand(8, 3, 32, 32) + 1
    corner = corners_of_batch(images)
    assert corner.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    visible = objective.maps(images)["visible"]
    for image, shown, k in zip(images, visible, corner.tolist(), strict=True):
        row, column = CORNERS[k]
        window = (slice(None), slice(16 * row, 16 * row + 16), slice(16 * column, 16 * column + 16))
        assert torch.equal(shown[window], image[window])
        assert (shown != 0).float().mean() == pytest.approx(0.25)


@pytest.mark.parametrize("batch", [1, 2, 3])
def test_every_corner_is_shown_by_small_batches_as_well(batch):
    drawn = [random_corners(torch.zeros(batch, 3, 8, 8)) for _ in range(64)]
    assert {k for corner in drawn for k in corner.tolist()} == {0, 1, 2, 3}
    for corner in drawn:
        assert len(set(corner.tolist())) == batch
        assert torch.equal(corner, corner.sort().values)


def test_batches_of_four_draw_nothing():
    torch.manual_seed(3)
    for batch in (4, 5, 128):
        images = torch.zeros(batch, 3, 8, 8)
        assert torch.equal(random_corners(images), corners_of_batch(images))
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(())), "the run's random numbers go on as they did"


def test_health_knows_the_corner_that_was_shown():
    objective = tiny()
    images = torch.randn(1, 3, 32, 32)
    for _ in range(8):
        outputs = objective(images)
        field = objective.extrapolate(outputs.field, objective.corner)
        expected = relative_residual(objective.law, field).item()
        assert objective.health(outputs)["health/law_residual"] == pytest.approx(expected)
        if objective.corner.item():
            break
    assert objective.corner.item(), "another corner than the first"


LAWS = ["commuting", "full", "copy", "free", "mlp"]


@pytest.mark.parametrize("law", LAWS)
def test_each_quarter_is_the_visible_one_moved_by_half_a_map(law):
    objective = tiny(law=law)
    quarter = torch.randn(4, 48, 2, 2)
    field = objective.extrapolate(quarter, torch.arange(4))
    for k, (row, column) in enumerate(CORNERS):
        for i in (0, 1):
            for j in (0, 1):
                block = field[k, :, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
                moved = objective.law.propagate(quarter[k : k + 1], dx=2 * (j - column), dy=2 * (i - row))[0]
                assert torch.allclose(block, moved, atol=1e-6)


@pytest.mark.parametrize("law", LAWS)
def test_every_law_and_control_learns(law):
    """A parameter without a gradient, or figures that only some laws have, would stop the run of a control."""
    objective = tiny(law=law)
    outputs = objective(torch.randn(4, 3, 32, 32))
    outputs.loss.backward()
    assert all(bool(p.grad.abs().sum() > 0) for p in objective.law.parameters())
    figures = objective.health(outputs)
    assert ("health/commutator" in figures) == (law in ("commuting", "full"))
    assert figures["health/law_residual"] > 0
    assert objective.maps(torch.randn(4, 3, 32, 32))["law_residual"].shape == (4, 4, 4)


def test_the_hidden_part_reaches_the_loss_only_as_target():
    """The prediction must not change with hidden pixels: else the task leaks its answer."""
    objective = tiny(target="plain").eval()
    images = torch.randn(4, 3, 32, 32)
    mask = objective.maps(images)["visible_mask"][:, None]
    changed = torch.where(mask, images, torch.randn_like(images))
    assert torch.equal(objective.maps(images)["reconstruction"], objective.maps(changed)["reconstruction"])
    assert objective(images).loss != objective(changed).loss


@pytest.mark.parametrize("target", ["normalised", "plain"])
def test_loss_is_that_of_its_formula(target):
    objective = tiny(target=target, visible_weight=0.5).eval()
    images = torch.randn(4, 3, 32, 32)
    corner = corners_of_batch(images)
    prediction = objective.decoder(objective.extrapolate(objective.encode(images, corner), corner))
    hidden, visible = [], []
    for b, (row, column) in enumerate(CORNERS):
        for i in range(4):
            for j in range(4):
                patch = images[b, :, 8 * i : 8 * i + 8, 8 * j : 8 * j + 8].flatten()
                if target == "normalised":
                    patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
                error = (prediction[b, :, i, j] - patch).square().mean()
                (visible if (i // 2, j // 2) == (row, column) else hidden).append(error)
    assert (len(hidden), len(visible)) == (48, 16)
    expected = torch.stack(hidden).mean() + 0.5 * torch.stack(visible).mean()
    assert objective(images).loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "size"), [("vit_tiny_patch16_224", 32), ("test_resnet", 64)])
def test_a_few_steps_learn_something(name, size):
    """On two images, seen from every corner, reconstruction must become far better than the patch mean (loss 1)."""
    objective = tiny(name, size)
    y, x = torch.meshgrid(torch.linspace(0, 9, size), torch.linspace(0, 7, size), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(x - y)])[:, None].repeat(4, 3, 1, 1)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(60):
        outputs = objective(waves)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert outputs.loss.item() < 0.6
    assert all(p.grad is not None for p in objective.law.parameters()), "the law itself must learn"


def test_health_tells_a_collapsed_field():
    objective = tiny()
    outputs = objective(torch.randn(16, 3, 32, 32))
    healthy = objective.health(outputs)
    for parameter in objective.backbone.parameters():  # one and the same vector for every image and position
        torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(objective.backbone.norm.bias)
    collapsed = objective.health(objective(torch.randn(16, 3, 32, 32)))
    assert healthy["health/rankme"] > 5 > 1.1 > collapsed["health/rankme"] - 1e-3
    assert collapsed["health/channel_std"] == pytest.approx(0, abs=1e-6)
    assert healthy["health/commutator"] < 1e-5
    assert 0.9 < healthy["health/spectral_radius"] < 1.11
    assert tiny(law="full").health(outputs)["health/commutator"] > 0.01


def test_rankme_counts_directions():
    features = torch.zeros(20, 10)
    features[:4, :4] = torch.eye(4)
    assert rankme(features).item() == pytest.approx(4, rel=1e-3)
    assert channel_std(torch.randn(50, 3, 20, 20) * 2).item() == pytest.approx(2, rel=0.05)


def test_the_commutator_penalty_acts_on_full_matrices_only():
    images = torch.randn(4, 3, 32, 32)
    plain, penalised = tiny(law="full").eval(), tiny(law="full", commutator_weight=1.0).eval()
    assert penalised(images).loss > plain(images).loss
    assert tiny(commutator_weight=1.0).eval()(images).loss == tiny().eval()(images).loss


@pytest.mark.parametrize(
    ("call", "fix"),
    [
        (lambda: tiny(size=24), "cannot be quartered"),
        (lambda: tiny(target="patches"), "normalised"),
        (lambda: tiny(law="heat"), "commuting, full, copy, free, mlp"),
        (lambda: tiny(commuting=True), "commuting"),
        (lambda: objectives.create({"name": "qbheat"}, torch.nn.Identity(), 32), "qb_heat"),
    ],
)
def test_bad_settings_name_the_fix(call, fix):
    with pytest.raises(UserError, match=fix):
        call()


def test_single_images_and_odd_batches_work():
    for batch in (1, 3, 5):
        assert torch.isfinite(tiny()(torch.randn(batch, 3, 32, 32)).loss)


def test_a_map_that_is_rounded_up_is_refused_as_hidden_pixels_would_be_seen():
    """ConvNeXt at 80 px has 2 x 2 positions of 40 pixels, and cuts quarters out by its stride of 32."""
    with pytest.raises(UserError, match=r"image_size=80 is no two halves of whole strides of 32.*multiple of 64"):
        tiny("test_convnext", 80)
    assert tiny("test_convnext", 64).patch == 32


def test_the_deviation_of_one_value_is_a_number():
    assert channel_std(torch.ones(1, 3, 1, 1)) == 0
