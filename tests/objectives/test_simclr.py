"""SimCLR: NT-Xent is eq. 1, and the two views of an image are what must agree."""

import math

import pytest
import torch

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.errors import UserError
from heatssl.objectives.simclr import nt_xent

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


def tiny(name: str = "vit_tiny_patch16_224", size: int = 32, **settings):
    torch.manual_seed(0)
    backbone = create_backbone(name, size, **(TINY if name.startswith("vit") else {}))
    return objectives.create({"name": "simclr"} | settings, backbone, size)


def embeddings(images: int = 6, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    first, second = torch.randn(2, images, 8, generator=torch.Generator().manual_seed(seed))
    return first, second


def test_nt_xent_is_equation_1():
    first, second = embeddings()
    every = torch.nn.functional.normalize(torch.cat([first, second]), dim=1)
    losses = []
    for i in range(12):
        partner = (i + 6) % 12
        similar = [math.exp(every[i] @ every[k] / 0.3) for k in range(12)]
        losses.append(-math.log(similar[partner] / sum(similar[k] for k in range(12) if k != i)))
    assert nt_xent(first, second, 0.3).item() == pytest.approx(sum(losses) / 12, rel=1e-5)


def test_nt_xent_does_not_care_for_order_length_or_which_view_is_first():
    first, second = embeddings()
    loss = nt_xent(first, second, 0.1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(loss, nt_xent(first[order], second[order], 0.1))
    assert torch.allclose(loss, nt_xent(second, first, 0.1))
    assert torch.allclose(loss, nt_xent(first * 7, second / 3, 0.1))
    assert not torch.allclose(loss, nt_xent(first[order], second, 0.1)), "but it does care which views belong together"


def test_nt_xent_of_known_embeddings():
    """Pairs alike and images orthogonal: one similarity of 1 against 2 B - 2 of 0; all alike: uniform."""
    pairs = torch.eye(5, 8)
    assert nt_xent(pairs, pairs, 0.5).item() == pytest.approx(math.log(1 + 8 * math.exp(-2)), rel=1e-5)
    same = torch.ones(5, 8)
    assert nt_xent(same, same, 0.5).item() == pytest.approx(math.log(9), rel=1e-5)


def test_nt_xent_gradient():
    first, second = (part.requires_grad_() for part in embeddings(3))
    nt_xent(first, second, 0.5).backward()
    for part, other in ((first, second), (second, first)):
        for i, j in ((0, 0), (2, 5)):
            step = torch.zeros_like(part)
            step[i, j] = 1e-2
            difference = nt_xent(part + step, other, 0.5) - nt_xent(part - step, other, 0.5)
            assert part.grad[i, j].item() == pytest.approx(difference.item() / 2e-2, abs=1e-3)


@pytest.mark.parametrize("temperature", [0.07, 0.5])
def test_nt_xent_equals_lightly(temperature):
    reference = pytest.importorskip("lightly.loss.ntx_ent_loss").NTXentLoss(temperature)
    first, second = (part.requires_grad_() for part in embeddings(16))
    expected = reference(first, second)
    loss = nt_xent(first, second, temperature)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
    wanted = torch.autograd.grad(expected, (first, second))
    assert torch.allclose(torch.stack(torch.autograd.grad(loss, (first, second))), torch.stack(wanted), atol=1e-6)


def test_half_precision_around_it_does_not_reach_the_loss():
    first, second = embeddings()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nt_xent(first, second, 0.05), nt_xent(*embeddings(), 0.05))
        assert nt_xent(first, second, 0.05).dtype == torch.float32


def test_it_learns_to_tell_images_apart():
    objective = tiny(temperature=0.5, colour_jitter=0.0, grey=0.0, blur=0.0)
    images = torch.randn(8, 3, 1, 1) + 0.3 * torch.randn(8, 3, 32, 32)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=2e-3)
    losses = []
    for _ in range(15):
        losses.append(objective(images).loss)
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.8 * losses[0]
    assert [name for name, p in objective.named_parameters() if p.grad is None] == []


def test_outputs_and_maps():
    objective = tiny("test_resnet", 64)
    images = torch.randn(4, 3, 64, 64)
    torch.manual_seed(1)
    outputs = objective(images)
    assert outputs.field.shape[0] == 8, "the features of both views"
    assert not outputs.field.requires_grad
    assert set(objective.health(outputs)) == {"health/rankme", "health/channel_std"}
    torch.manual_seed(1)
    maps = objective.maps(images)
    assert set(maps) == {"first_view", "second_view"}
    assert not torch.equal(maps["first_view"], maps["second_view"])
    torch.manual_seed(1)
    assert torch.equal(outputs.loss, objective(images).loss), "a step of a resumed run repeats"


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        ({"temperature": 0.0}, "positive"),
        ({"crop_scale": [1.0, 0.2]}, r"such as \[0.2,1.0\]"),
        ({"blur": 2.0}, "between 0 and 1"),
    ],
)
def test_bad_settings_name_the_fix(settings, fix):
    with pytest.raises(UserError, match=fix):
        tiny(**settings)
