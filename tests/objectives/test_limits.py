"""Settings that torch would take badly, or in silence, are answered in one line."""

import math
from typing import Any

import pytest

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.errors import UserError

TINY = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}


@pytest.mark.parametrize(
    ("name", "setting", "value"),
    [
        ("mae", "decoder_heads", 0),
        ("mae", "decoder_width", 0),
        ("mae", "decoder_width", -32),
        ("qb_heat", "decoder_width", 0),
        ("qb_heat", "decoder_width", -1),
        ("qb_heat", "decoder_depth", -1),
        ("qb_heat", "projector_depth", 0),
        ("qb_heat", "visible_weight", -1.0),
        ("qb_heat", "visible_weight", math.nan),
        ("qb_heat", "commutator_weight", -1.0),
        ("qb_heat", "channels", -2),
        ("qb_heat", "channels", 0),
        ("finola", "channels", -2),
        ("heat_completion", "channels", -8),
        ("heat_completion", "channels", 0),
        ("heat_completion", "painter_width", -4),
        ("heat_completion", "painter_width", "wide"),
        ("heat_completion", "painter_width", True),
        ("heat_jepa", "channels", -8),
        ("heat_jepa", "channels", 0),
        ("heat_jepa", "temperature", math.nan),
        ("simclr", "head_width", -1),
        ("simclr", "head_width", 0),
        ("simclr", "embedding_width", 0),
        ("simclr", "embedding_width", -1),
        ("lejepa", "head_width", 0),
        ("simmim", "mask_unit", 0),
        ("simmim", "mask_unit", 16.0),
        ("simclr", "head_width", 1.5),
    ],
)
def test_what_no_objective_can_have_is_refused(name: str, setting: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"objective {name}: {setting}={value} ") as refusal:
        objectives.create({"name": name, setting: value}, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    assert "\n" not in str(refusal.value)


def test_the_least_that_is_allowed_and_null_are_taken() -> None:
    for settings in (
        {"name": "heat_completion", "painter_width": 0, "channels": None},
        {"name": "qb_heat", "decoder_depth": 0, "decoder_width": 1, "visible_weight": 0.0},
        {"name": "simclr", "head_width": None, "embedding_width": 1},
    ):
        objectives.create(settings, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
