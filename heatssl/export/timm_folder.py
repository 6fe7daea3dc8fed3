"""A folder as timm and the Hugging Face hub take it: ``timm.create_model("local-dir:FOLDER", pretrained=True)``.

What timm's model gives should be what heatssl measures: the mean over positions, or a classifier's logits. timm's own
default may pool otherwise, so the first of its poolings is taken that gives the same numbers.
"""

import json
import tempfile
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.backbones import arguments_as_trained, create_backbone, pooled_features
from heatssl.backbones.models import MODELS
from heatssl.errors import UserError
from heatssl.export.backbone_files import BackboneInfo, Head, first_mismatch
from heatssl.files import write_atomically

# Arguments of timm's models with which they pool as heatssl does; a kind of model knows some of them.
_POOLINGS: tuple[dict[str, Any], ...] = (
    {},
    {"global_pool": "avg"},
    {"global_pool": "avg", "fc_norm": False},
    {"global_pool": "avg", "use_fc_norm": False},
    {"global_pool": "avg", "use_fc_norm": False, "use_post_transformer_norm": False},
)
_ORIGIN = ("url", "file", "hf_hub_id", "hf_hub_filename", "source", "tag")  # of timm's own weights
_ABOUT = ("license", "description", "origin_url", "paper_name", "paper_ids", "notes")  # what it says of these
_TOLERANCE = 1e-4  # relative, of the largest number


class TimmModel(NamedTuple):
    """A model of timm's, in evaluation mode on the CPU.

    Attributes:
        module: normalised images (B, 3, S, S) -> (B, C), or logits (B, K); ``pretrained_cfg`` says how images are
            to be prepared.
        output: what these are, in words.
    """

    module: nn.Module
    output: str


def timm_model(backbone: nn.Module, info: BackboneInfo, head: Head | None = None) -> TimmModel:
    """A model of timm's with these weights, which pools as heatssl does where timm can.

    Args:
        backbone: as :func:`heatssl.export.load_backbone` gives it, or resized since; any device.
        info: what is known about it; its image size is that of the images.
        head: of :func:`heatssl.export.load_head`.

    Raises:
        UserError: when no pooling of timm's gives what a head was trained on.
    """
    backbone = backbone.cpu().eval()
    images = torch.randn(2, 3, info.image_size, info.image_size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        wanted = pooled_features(backbone, images)
        if head is not None:
            wanted = F.linear(wanted, head.weight, head.bias)
    for pooling in _POOLINGS:
        model = _same_weights(backbone, info, head, pooling)
        if model is None:
            continue
        with torch.inference_mode():
            found = model(images)
        if found.shape == wanted.shape and (found - wanted).abs().max() <= _TOLERANCE * wanted.abs().max():
            return _prepared(
                model, info, "mean over positions" if head is None else f"logits of {len(wanted[0])} classes"
            )
    model = None if head is not None else _same_weights(backbone, info, None, {})
    if model is None:
        raise UserError(
            f"timm's {info.name} cannot pool as the classifier was trained, on the mean over positions: export the "
            "backbone without it"
        )
    return _prepared(model, info, "timm's own pooling; heatssl measures the mean of forward_features over positions")


def _prepared(model: Any, info: BackboneInfo, output: str) -> TimmModel:
    """With what timm is to know of it, in place of what it knows of weights of its own."""
    model.pretrained_cfg = without_origin(model.pretrained_cfg) | _preparation(info)
    return TimmModel(model, output)


def without_origin(configuration: dict[str, Any]) -> dict[str, Any]:
    """What timm says of a model, but for what it says of weights of its own: these are others."""
    kept = {key: value for key, value in configuration.items() if key not in (*_ORIGIN, *_ABOUT)}
    return kept | {"tag": "heatssl"}


def write_timm_folder(folder: Path, model: TimmModel, info: BackboneInfo, head: Head | None = None) -> list[Path]:
    """Write ``config.json``, ``model.safetensors`` and ``README.md``, each whole or not at all.

    Returns:
        Their paths.

    Raises:
        UserError: when the disk is full or cannot be written.
    """
    labels = {} if head is None else {"label_names": head.classes}
    with tempfile.TemporaryDirectory() as scratch:
        timm.models.save_for_hf(model.module, scratch, model_config=labels, safe_serialization=True)
        contents = {path.name: path.read_bytes() for path in sorted(Path(scratch).iterdir())}
    contents["README.md"] = _read_me(model, info, head).encode()
    for name, content in contents.items():
        write_atomically(folder / name, partial(_write, content))
    return [folder / name for name in contents]


def _write(content: bytes, file: BinaryIO) -> None:
    file.write(content)


def _same_weights(backbone: nn.Module, info: BackboneInfo, head: Head | None, pooling: dict[str, Any]) -> Any:
    """The model with this pooling; None where timm has none such, or its weights are others."""
    arguments = info.arguments | arguments_as_trained(backbone) | pooling
    try:
        model = create_backbone(
            info.name, info.image_size, classes=0 if head is None else len(head.classes), **arguments
        ).eval()
    except UserError:
        return None
    state: dict[str, Tensor] = dict(backbone.state_dict())
    if head is not None:
        name = getattr(model, "pretrained_cfg", {}).get("classifier")
        if not isinstance(name, str):
            return None
        state |= {f"{name}.weight": head.weight, f"{name}.bias": head.bias}
    wanted = model.state_dict()
    used = {key: value for key, value in state.items() if key in wanted}  # a pool of timm's may have weights of its own
    if first_mismatch(used, wanted) is not None:
        return None
    model.load_state_dict(used)
    return model


def _preparation(info: BackboneInfo) -> dict[str, Any]:
    """How images become the model's input, in timm's words: the largest square in the middle, scaled."""
    return {
        "input_size": (3, info.image_size, info.image_size),
        "mean": tuple(info.mean),
        "std": tuple(info.std),
        "crop_pct": 1.0,
        "crop_mode": "center",
        "interpolation": "bilinear",
    }


def _read_me(model: TimmModel, info: BackboneInfo, head: Head | None) -> str:
    """What a reader of the folder has to know."""
    shape = "C" if head is None else f"{len(head.classes)}"
    own = "import heatssl  # knows this kind of model\n" if info.name in MODELS else ""
    steps = f", pretrained by heatssl for {info.step} steps" if info.step else ""
    size = info.image_size
    millions = sum(parameter.numel() for parameter in model.module.parameters()) / 1e6
    return f"""---
library_name: timm
tags:
- image-{"feature-extraction" if head is None else "classification"}
- timm
---
# {info.name}{steps}

Images of {size} x {size} pixels, mean {info.mean}, deviation {info.std} -> {model.output}.
{millions:.2f} M parameters. Arguments of the model: {json.dumps(info.arguments)}

```python
{own}import timm

model = timm.create_model("local-dir:.", pretrained=True).eval()  # this folder; hf-hub:USER/NAME once it is there
prepare = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
output = model(prepare(image)[None])  # of a PIL image: (1, {shape})
```
"""
