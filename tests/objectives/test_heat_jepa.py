"""Heat-JEPA: quarters that cannot see each other must agree on the heat that comes to rest in them."""

import pytest
import torch
import torch.nn.functional as F

from heatssl import objectives
from heatssl.backbones import create_backbone, feature_map
from heatssl.errors import UserError
from heatssl.objectives.heat_jepa import agreement, contrast_of_parts
from heatssl.objectives.painting import centred_positions

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
WAYS = ["contrast", "isotropy", "teacher"]


def tiny(**settings):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **TINY)
    return objectives.create({"name": "heat_jepa"} | settings, backbone, 32)


def test_quarters_are_the_blocks_of_the_grid():
    index = tiny().quarters(3, torch.device("cpu"))
    assert index.shape == (12, 4)
    assert index[::3].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]
    assert torch.equal(index[0], index[2])


def test_no_quarter_sees_another():
    objective = tiny().eval()
    images = torch.randn(2, 3, 32, 32)
    visible = objective.quarters(2, images.device)
    before = objective.encode(objective.cut(images, visible), visible)
    changed = images.clone()
    changed[..., 16:, 16:] = torch.randn(2, 3, 16, 16)  # the last quarter
    after = objective.encode(objective.cut(changed, visible), visible)
    assert torch.equal(before[:6], after[:6])
    assert not torch.equal(before[6:], after[6:])


@pytest.mark.parametrize(("ratio", "visible"), [(1.0, 4), (0.5, 2), (0.25, 1)])
def test_of_each_quarter_a_random_choice_is_encoded(ratio, visible):
    objective = tiny(visible_ratio=ratio)
    quarters = objective.quarters(64, torch.device("cpu"))
    chosen = objective.some_of(quarters)
    assert chosen.shape == (256, visible)
    assert all(
        len(set(row)) == visible and set(row) <= set(all_of_it)
        for row, all_of_it in zip(chosen.tolist(), quarters.tolist(), strict=True)
    )
    assert set(chosen.flatten().tolist()) == set(range(16)), "every patch has its turn"
    assert objective(torch.randn(4, 3, 32, 32)).field.shape == (16, 48, visible, 1)


def test_each_quarter_gets_colours_of_its_own_and_stays_in_its_place():
    objective = tiny(colour_jitter=0.0, grey=0.5)
    torch.manual_seed(1)
    images = torch.randn(16, 3, 32, 32).clamp(-1, 1)
    patches = objective.cut(images, objective.quarters(16, images.device))
    torch.testing.assert_close(patches[0, 1], images[0, :, 0:8, 8:16])  # the second patch of the first quarter
    torch.testing.assert_close(patches[3 * 16 + 5, 0], images[5, :, 16:24, 16:24])
    changed = objective.recoloured(patches)
    assert changed.shape == patches.shape
    kept = ((changed - patches).abs().amax(dim=(2, 3, 4)) < 1e-5).unflatten(0, (4, 16))  # 4 B n
    assert (kept.all(dim=2) == kept.any(dim=2)).all(), "the patches of a quarter change together"
    assert 0 < kept.float().mean() < 1
    assert len(set(kept[..., 0].sum(dim=0).tolist())) > 1
    untouched = tiny(colour_jitter=0.0, grey=0.0).recoloured(patches)
    torch.testing.assert_close(untouched, patches, rtol=1e-5, atol=1e-5)


def test_a_blur_stays_within_its_quarter():
    objective = tiny(blur=1.0)
    images = torch.zeros(2, 3, 32, 32)
    images[..., :16, :16] = 1.0  # the first quarter, even: nothing in it to blur
    torch.manual_seed(0)
    torch.testing.assert_close(objective.blurred(images), images, rtol=1e-4, atol=1e-4)
    noise = torch.randn(2, 3, 32, 32).clamp(-1, 1)
    assert objective.blurred(noise).diff(dim=3).abs().mean() < 0.9 * noise.diff(dim=3).abs().mean()
    assert torch.equal(tiny().blurred(noise), noise)


def test_a_field_that_obeys_the_law_agrees_perfectly_and_without_transport_does_not():
    objective = tiny(transport=True)
    index = objective.quarters(2, torch.device("cpu"))
    law = objective.transport
    rest = torch.randn(2, 1, 48).repeat(4, 4, 1)  # one vector for each image, whatever the place
    field = law.from_rest(rest, centred_positions(index, objective.grid))

    def spread(values: torch.Tensor) -> float:
        parts = values.mean(dim=1).unflatten(0, (4, 2))
        return (parts - parts.mean(dim=0)).square().mean().item()

    assert spread(objective.to_rest(field, index)) < 1e-10
    assert spread(field) > 1e-2


@pytest.mark.parametrize("temperature", [0.1, 1.0])
def test_contrast_is_that_of_its_formula(temperature):
    parts = torch.randn(3, 5, 8, requires_grad=True)
    total, count = 0.0, 0
    for p in range(3):
        for q in range(3):
            for i in range(5):
                if p == q:
                    continue
                similarity = lambda r, j: F.cosine_similarity(parts[p, i], parts[r, j], dim=0) / temperature  # noqa: E731, B023
                others = sum(similarity(r, j).exp() for r in range(3) for j in range(5) if j != i)
                total = total - torch.log(similarity(q, i).exp() / (similarity(q, i).exp() + others))
                count += 1
    expected = total / count
    found = contrast_of_parts(parts, temperature)
    assert found.item() == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(torch.autograd.grad(found, parts), torch.autograd.grad(expected, parts))


@pytest.mark.parametrize("transport", [True, False])
def test_quarters_of_all_crops_of_an_image_are_its_parts(transport):
    objective = tiny(transport=transport, crops=3, visible_ratio=1.0, colour_jitter=0.0, grey=0.0).eval()
    images = torch.rand(6, 3, 32, 32)  # two images, three crops each
    with torch.no_grad():
        outputs = objective(images)
        visible = objective.quarters(6, images.device)
        at_rest = objective.to_rest(
            objective.encode(objective.recoloured(objective.cut(images, visible)), visible), visible
        )
        at_rest = at_rest.mean(dim=1)
        parts = [
            torch.stack([at_rest[quarter * 6 + image * 3 + crop] for image in range(2)])
            for crop in range(3)
            for quarter in range(4)
        ]
        expected = contrast_of_parts(torch.stack(parts), objective.temperature)
    torch.testing.assert_close(outputs.loss, expected)
    torch.testing.assert_close(outputs.logs["similarity/quarters"], agreement(torch.stack(parts)))


def test_contrast_does_not_depend_on_lengths_or_order():
    parts = torch.randn(4, 6, 8)
    loss = contrast_of_parts(parts, 0.2)
    torch.testing.assert_close(contrast_of_parts(parts * torch.rand(4, 6, 1).add(0.1), 0.2), loss)
    torch.testing.assert_close(contrast_of_parts(parts[:, torch.randperm(6)][torch.randperm(4)], 0.2), loss)


def test_agreement_is_the_mean_cosine_of_pairs():
    parts = torch.randn(3, 4, 8)
    pairs = [F.cosine_similarity(parts[a], parts[b]) for a, b in ((0, 1), (0, 2), (1, 2))]
    assert agreement(parts).item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)
    assert agreement(parts[:1].expand(3, -1, -1)).item() == pytest.approx(1)


@pytest.mark.parametrize("transport", [True, False])
@pytest.mark.parametrize("way", WAYS)
def test_quarters_come_to_agree_without_collapse(way, transport):
    objective = tiny(against_collapse=way, transport=transport, colour_jitter=0.0, grey=0.0, momentum=0.9)
    torch.manual_seed(0)
    colours = torch.randn(16, 3, 1, 1)
    images = colours + 0.3 * torch.randn(16, 3, 32, 32)  # what the quarters of an image share is its colour
    trained = [parameter for parameter in objective.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, 3e-3)
    losses = []
    for _ in range(25):
        optimizer.zero_grad()
        outputs = objective(images)
        outputs.loss.backward()
        optimizer.step()
        losses.append(outputs.loss.item())
    assert losses[-1] < 0.9 * losses[0]
    assert objective.health(outputs)["health/channel_std"] > 0.05
    if way != "teacher":
        assert outputs.logs["similarity/quarters"] > 0.5


def test_the_teacher_drops_no_paths_whatever_is_trained():
    backbone = create_backbone("vit_tiny_patch16_224", 32, **TINY, drop_path_rate=0.5)
    objective = objectives.create({"name": "heat_jepa", "against_collapse": "teacher"}, backbone, 32)
    images = torch.randn(8, 3, 32, 32)
    for trained in (objective, objective.train(), objective.eval().train()):
        assert trained.backbone.training
        assert torch.equal(feature_map(trained.teacher, images), feature_map(trained.teacher, images))
    assert not objective.eval().backbone.training


def test_the_teacher_follows_slowly_and_gets_no_gradient():
    objective = tiny(against_collapse="teacher", momentum=0.75)
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            parameter.add_(1.0)
    before = objective.teacher.norm.weight.clone()
    objective(torch.randn(2, 3, 32, 32)).loss.backward()
    torch.testing.assert_close(objective.teacher.norm.weight, before + 0.25)
    assert all(parameter.grad is None for parameter in objective.teacher.parameters())
    objective.eval()
    after = objective.teacher.norm.weight.clone()
    objective(torch.randn(2, 3, 32, 32))
    assert torch.equal(objective.teacher.norm.weight, after)


def test_the_residual_shows_where_an_image_differs_from_the_rest_of_it():
    objective = tiny().eval()
    objective.backbone.pos_embed.data.zero_()
    images = torch.zeros(1, 3, 32, 32)
    images[..., 24:, 24:] = 5 * torch.randn(3, 8, 8)
    residual = objective.maps(images)["law_residual"][0]
    assert residual.argmax() == 15


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"against_collapse": "hope"}, "contrast, isotropy, teacher"),
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"momentum": 1.0}, "momentum"),
        ({"grey": 2.0}, "grey"),
        ({"crops": 0}, "crops must be at least 1"),
        ({"visible_ratio": 0.0}, "visible_ratio=0.0 shows 0"),
        ({"visible_ratio": 1.5}, "at most 1"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(UserError, match=message):
        tiny(**settings)


def test_heat_flows_in_each_quarter_for_a_time_of_its_own():
    torch.manual_seed(0)
    images = torch.randn(1, 3, 32, 32).expand(64, -1, -1, -1)
    changed = tiny(blur=0.5).blurred(images)
    left = changed.unflatten(3, (2, 16)).unflatten(2, (2, 16)).std(dim=(1, 3, 5)).flatten()  # of 256 quarters
    given = images[0].unflatten(2, (2, 16)).unflatten(1, (2, 16)).std(dim=(0, 2, 4)).flatten().repeat(64)
    kept = torch.isclose(left, given, rtol=1e-3)
    assert 0.4 < kept.float().mean() < 0.6
    assert len(set((left / given)[~kept].mul(1e4).round().tolist())) > 100
    torch.testing.assert_close(changed.mean(dim=(2, 3)), images.mean(dim=(2, 3)), rtol=0, atol=1e-5)
    with pytest.raises(UserError, match=r"blur=1.5 is a probability"):
        tiny(blur=1.5)
