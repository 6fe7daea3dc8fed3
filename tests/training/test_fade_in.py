"""Post-norm layers are faded in over the steps that were asked for, and a short run's weights say how far it came."""

from collections.abc import Callable

import pytest

from heatssl.config import PretrainConfig
from heatssl.errors import UserError
from heatssl.export import load_backbone
from heatssl.training import pretrain

MakeConfig = Callable[..., PretrainConfig]
ROFORMER = {
    "backbone": "roformer_v2_small_patch16_224",
    "backbone_arguments": {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8},
}


@pytest.mark.parametrize(("fade_in_steps", "share"), [(8, 0.5), (2, 1.0), (0, 1.0)])
def test_the_share_grows_evenly_and_is_kept(make_config: MakeConfig, fade_in_steps: int, share: float) -> None:
    folder = pretrain(make_config(**ROFORMER, steps=4, fade_in_steps=fade_in_steps, knn_every=0))
    backbone, _ = load_backbone(folder)
    assert {block.attention.ramp.item() for block in backbone.blocks} == {share}


def test_a_backbone_without_such_layers_is_refused_before_the_first_step(make_config: MakeConfig) -> None:
    config = make_config(fade_in_steps=5)
    with pytest.raises(UserError, match="no post-norm layer to fade in"):
        pretrain(config)
