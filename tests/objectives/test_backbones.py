"""Every objective trains every kind of backbone that is registered here, and has its pictures."""

import pytest
import torch

from heatssl import objectives
from heatssl.backbones import create_backbone

KINDS = {
    "gau_tiny_patch16_224": {"key_width": 16},
    "flash_small_patch16_224": {"key_width": 16, "chunk": 3},
    "roformer_v2_small_patch16_224": {"num_heads": 3},
}
NAMES = ["heat_jepa", "heat_completion", "qb_heat", "finola", "mae", "simmim", "simclr", "lejepa"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_an_objective_trains_and_shows_its_maps(kind, name):
    backbone = create_backbone(kind, 64, patch_size=8, depth=2, embed_dim=48, **KINDS[kind])
    objective = objectives.create({"name": name}, backbone, 64)
    outputs = objective(torch.randn(8, 3, 64, 64))
    outputs.loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in backbone.blocks.parameters())
    assert objective.maps(torch.randn(2, 3, 64, 64))
