"""A timm model for one image size, as a rule without its classifier."""

import inspect
from collections.abc import Mapping
from typing import Any

import timm
from torch import nn

from heatssl.backbones.fields import patch_sides
from heatssl.errors import UserError, did_you_mean

TIMM_SOURCES = ("hf-hub:", "local-dir:")  # what timm.create_model takes besides its own names
# What a model starts from, not what it is: who builds it again has weights of its own, or wants random ones.
_STARTING_WEIGHTS = ("pretrained", "checkpoint_path", "pretrained_cfg", "pretrained_cfg_overlay")
_COUNTS = ("patch_size", "embed_dim", "depth", "num_heads")  # of transformers; timm takes some below 1 without a word


def create_backbone(
    name: str, image_size: int, *, pretrained: bool = False, classes: int | None = 0, **arguments: Any
) -> nn.Module:
    """Create a timm model that ends in features, or in a classifier where one is asked for.

    Args:
        name: any name of ``timm.list_models()``, ``hf-hub:user/name`` or ``local-dir:folder``.
        image_size: pixels of the square input; sizes position embeddings where the model has them.
        pretrained: load timm's weights (needs network or timm's cache).
        classes: of its classifier; 0: none; None: that of timm's weights.
        **arguments: passed on to ``timm.create_model``, for example ``patch_size=8, depth=6``; an ``img_size`` among
            them, as some older runs have it, is the model's in place of ``image_size``.

    Raises:
        UserError: on an unknown name (the nearest one is named), on arguments that the model does not take,
            on counts below 1, on an image smaller than one patch, and on weights that are not to be had.
    """
    if not name.startswith(TIMM_SOURCES) and not timm.is_model(name):
        raise UserError(
            f"unknown backbone {name!r}{did_you_mean(name, timm.list_models())} (timm.list_models() lists all)"
        )
    for key in _COUNTS:
        count = arguments.get(key)
        if isinstance(count, int) and count < 1:
            raise UserError(f"backbone_arguments.{key}={count} of {name} must be at least 1")
    patch = arguments.get("patch_size")
    if isinstance(patch, int) and image_size < patch:
        raise UserError(
            f"data.image_size={image_size} is smaller than one patch of {patch} pixels: "
            "raise it or lower backbone_arguments.patch_size"
        )
    try:
        try:
            sized = {"img_size": image_size} | arguments
            backbone = timm.create_model(name, pretrained=pretrained, num_classes=classes, **sized)
        except TypeError as error:
            # Convolutional models take any size and have no such argument.
            if "img_size" in arguments or "img_size" not in str(error):
                raise
            backbone = timm.create_model(name, pretrained=pretrained, num_classes=classes, **arguments)
    except (TypeError, ValueError, KeyError, AssertionError, ArithmeticError, RuntimeError, OSError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items()) or "no arguments"
        raise UserError(
            f"{name} cannot be created for {image_size} pixels with {given}: {_first_line(error)}"
        ) from error
    _check_patch(name, backbone, image_size)
    return backbone


def without_starting_weights(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of :func:`create_backbone` that say what a model is, less those that say what it starts from."""
    return {key: value for key, value in arguments.items() if key not in _STARTING_WEIGHTS}


def _check_patch(name: str, backbone: nn.Module, image_size: int) -> None:
    patch = max(patch_sides(backbone) or (1,))
    if image_size < patch:
        raise UserError(
            f"data.image_size={image_size} is smaller than one {patch}-pixel patch of {name}: "
            "raise it or set backbone_arguments.patch_size"
        )


def _first_line(error: BaseException) -> str:
    return inspect.cleandoc(str(error)).split("\n", 1)[0] or type(error).__name__
