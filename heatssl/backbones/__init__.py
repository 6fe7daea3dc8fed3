"""timm models as backbones: made by name, asked for their geometry, run on whole images or on visible patches."""

from heatssl.backbones.create import create_backbone
from heatssl.backbones.encode import as_field, encode_block, encode_visible, feature_map, pooled_features
from heatssl.backbones.geometry import Geometry, geometry

__all__ = [
    "Geometry",
    "as_field",
    "create_backbone",
    "encode_block",
    "encode_visible",
    "feature_map",
    "geometry",
    "pooled_features",
]
