"""Masked FINOLA: quarters grow as its two forms say, from every corner, and what is hidden stays hidden."""

import pytest
import torch
import torch.nn.functional as F

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.errors import UserError
from heatssl.objectives.quarter import CORNERS

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
GROWTHS = ["block", "element"]


def tiny(**settings):
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **TINY)
    return objectives.create({"name": "finola", **settings}, backbone, 32)


def step(vector: torch.Tensor, matrix: torch.Tensor, sign: int) -> torch.Tensor:
    """One step of a single position (C,), written with layer_norm."""
    return vector + sign * matrix @ F.layer_norm(vector, vector.shape, eps=1e-6)


def walk(vector: torch.Tensor, moves: list[tuple[torch.Tensor, int]]) -> torch.Tensor:
    for matrix, steps in moves:
        for _ in range(abs(steps)):
            vector = step(vector, matrix, 1 if steps > 0 else -1)
    return vector


@pytest.mark.parametrize("growth", GROWTHS)
def test_each_position_is_so_many_steps_from_where_it_grew(growth):
    """Against one position at a time: from half a map away (block), or from the nearest visible position (element)."""
    objective = tiny(growth=growth)
    quarter = torch.randn(4, 48, 2, 2)
    field = objective.extrapolate(quarter, torch.arange(4))
    a, b = objective.law.A, objective.law.B
    for k, (row, column) in enumerate(CORNERS):
        for i in range(4):
            for j in range(4):
                y, x = i - 2 * row, j - 2 * column  # seen from the quarter's own first position
                from_y, from_x = (y % 2, x % 2) if growth == "block" else (min(max(y, 0), 1), min(max(x, 0), 1))
                along_x, along_y = (a, x - from_x), (b, y - from_y)
                start = quarter[k, :, from_y, from_x]
                expected = (walk(start, [along_x, along_y]) + walk(start, [along_y, along_x])) / 2
                assert torch.allclose(field[k, :, i, j], expected, atol=1e-5)


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_visible_quarter_itself_stays_as_it_is(growth):
    objective = tiny(growth=growth)
    quarter = torch.randn(4, 48, 2, 2)
    field = objective.extrapolate(quarter, torch.arange(4))
    for k, (row, column) in enumerate(CORNERS):
        kept = field[k, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2]
        assert torch.allclose(kept, quarter[k], atol=1e-6)


@pytest.mark.parametrize("growth", GROWTHS)
def test_the_hidden_part_reaches_the_loss_only_as_target(growth):
    objective = tiny(growth=growth, target="plain").eval()
    images = torch.randn(4, 3, 32, 32)
    mask = objective.maps(images)["visible_mask"][:, None]
    changed = torch.where(mask, images, torch.randn_like(images))
    assert torch.equal(objective.maps(images)["reconstruction"], objective.maps(changed)["reconstruction"])
    assert objective(images).loss != objective(changed).loss


@pytest.mark.parametrize("growth", GROWTHS)
def test_a_few_steps_learn_something(growth):
    """On two images, seen from every corner, reconstruction must become far better than the patch mean (loss 1)."""
    objective = tiny(growth=growth)
    y, x = torch.meshgrid(torch.linspace(0, 9, 32), torch.linspace(0, 7, 32), indexing="ij")
    waves = torch.stack([torch.sin(x + y), torch.cos(x - y)])[:, None].repeat(4, 3, 1, 1)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-3)
    for _ in range(60):
        outputs = objective(waves)
        optimizer.zero_grad()
        outputs.loss.backward()
        optimizer.step()
    assert outputs.loss.item() < 0.6
    assert all(bool(p.grad.abs().sum() > 0) for p in objective.law.parameters()), "the law itself must learn"
    assert objective.health(outputs)["health/law_residual"] > 0


def test_what_cannot_work_is_refused():
    with pytest.raises(UserError, match="unknown growth 'spiral': choose one of block, element"):
        tiny(growth="spiral")
    with pytest.raises(UserError, match="at least 2 channels"):
        tiny(channels=1)
