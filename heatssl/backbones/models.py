"""The models by name: what ``timm.create_model`` finds after ``import heatssl``.

Parameters are within 5 % of timm's ViT of the same size. No weights are published.
"""

from contextlib import nullcontext
from typing import Any

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import nn

from heatssl.backbones.flash import MixedChunkEncoder
from heatssl.backbones.gau import GatedAttentionEncoder
from heatssl.backbones.patch_encoder import PatchEncoder
from heatssl.backbones.position_table import checkpoint_filter_fn
from heatssl.backbones.roformer_v2 import RoFormerEncoder

WIDTHS = {"tiny": 192, "small": 384, "base": 768}
INPUTS = {"patch16_224": (16, 224), "patch8_96": (8, 96)}
KINDS: dict[str, tuple[type[PatchEncoder], dict[str, dict[str, int]]]] = {
    "gau": (
        GatedAttentionEncoder,
        {
            "tiny": {"depth": 24, "key_width": 64},
            "small": {"depth": 24, "key_width": 128},
            "base": {"depth": 24, "key_width": 128},
        },
    ),
    "flash": (MixedChunkEncoder, {"small": {"depth": 24, "key_width": 128}, "base": {"depth": 24, "key_width": 128}}),
    "roformer_v2": (RoFormerEncoder, {"small": {"depth": 12, "num_heads": 6}, "base": {"depth": 12, "num_heads": 12}}),
}
MODELS: dict[str, tuple[type[PatchEncoder], dict[str, int]]] = {
    f"{kind}_{size}_{inputs}": (model, {"embed_dim": WIDTHS[size], "img_size": image, "patch_size": patch, **settings})
    for kind, (model, sizes) in KINDS.items()
    for size, settings in sizes.items()
    for inputs, (patch, image) in INPUTS.items()
}


def _default_cfg(image_size: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, image_size, image_size),
        "pool_size": None,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "fixed_input_size": True,
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }


default_cfgs = generate_default_cfgs(
    {f"{name}.untrained": _default_cfg(settings["img_size"]) for name, (_, settings) in MODELS.items()}
)


def _register(name: str, model: type[PatchEncoder], settings: dict[str, int]) -> None:
    def create(pretrained: bool = False, **arguments: Any) -> nn.Module:
        features = {"out_indices": arguments.pop("out_indices", 3), "feature_cls": "getter"}
        loading: dict[str, Any] = {"feature_cfg": features, "pretrained_filter_fn": checkpoint_filter_fn}
        device, dtype = arguments.pop("device", None), arguments.pop("dtype", None)
        with nullcontext() if device is None else torch.device(device):
            made = build_model_with_cfg(model, name, pretrained, **loading, **settings | arguments)
        return made if dtype is None else made.to(dtype)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{model.__name__} of {settings}."
    register_model(create)


for _name, (_model, _settings) in MODELS.items():
    _register(_name, _model, _settings)
