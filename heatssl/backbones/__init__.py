"""timm models as backbones: made by name, asked for their geometry, run on whole images or on visible patches."""

from heatssl.backbones.create import create_backbone
from heatssl.backbones.encode import (
    encode_block,
    encode_visible,
    feature_map,
    patches_shown,
    pooled_features,
)
from heatssl.backbones.fields import as_field, check_encodes_patches, is_token_model
from heatssl.backbones.geometry import Geometry, geometry
from heatssl.backbones.input_size import arguments_as_trained, set_input_size
from heatssl.backbones.mask_token import embedding_width, encode_masked
from heatssl.backbones.modes import evaluation_mode
from heatssl.backbones.normalisers import NormaliserSettings
from heatssl.backbones.patch_embedding import cut_patches
from heatssl.backbones.positions import PositionSettings
from heatssl.backbones.residual import fade_in
from heatssl.backbones.switches import set_normaliser, set_positions

__all__ = [
    "Geometry",
    "NormaliserSettings",
    "PositionSettings",
    "arguments_as_trained",
    "as_field",
    "check_encodes_patches",
    "create_backbone",
    "cut_patches",
    "embedding_width",
    "encode_block",
    "encode_masked",
    "encode_visible",
    "evaluation_mode",
    "fade_in",
    "feature_map",
    "geometry",
    "is_token_model",
    "patches_shown",
    "pooled_features",
    "set_input_size",
    "set_normaliser",
    "set_positions",
]
