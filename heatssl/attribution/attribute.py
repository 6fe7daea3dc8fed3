"""From images to heatmaps: one function for every method, target and backbone."""

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution import methods
from heatssl.attribution.attribution import Attribution
from heatssl.attribution.targets import TargetLike, make_target
from heatssl.backbones import evaluation_mode, feature_map
from heatssl.errors import UserError, check_choice
from heatssl.evaluation import LinearProbe

Method = Callable[..., Attribution]


def attribute(
    model: nn.Module,
    images: Tensor,
    method: str = "gradcam",
    target: TargetLike = "self",
    size: Literal["input", "map"] = "input",
    normalize: bool = True,
    *,
    probe: LinearProbe | None = None,
    **options: Any,
) -> Tensor:
    """Where in each image the target comes from.

    Args:
        model: any timm model, with or without classifier; its modes and gradients are left as they are.
            Integrated gradients of a class takes any module that returns logits.
        images: normalised (B, 3, H, W) on the model's device.
        method: name of a file of ``heatssl.attribution.methods``, :func:`method_names` lists them; ``heat_flow:rise``
            is heat_flow over the map of rise.
        target: ``"self"``: cosine to the image's own pooled embedding; an int, or integer Tensor (B,): class
            logit of ``probe`` or of the model's own classifier; a floating Tensor (C,) or (B, C): cosine to
            an embedding; ``"margin"``, ``"entropy"``, ``"channel:N"``, or what a function of
            :mod:`heatssl.attribution.targets` returned: ``region(...)``, ``neighbours(...)``, ...
        size: ``input``: maps as large as the images (a coarse map is interpolated); ``map``: as large as the
            feature map (a fine map is summed over each of its positions, so that its total stays).
        normalize: magnitude, scaled so that the largest of each image is 1; an empty map stays zero. False:
            raw values.
        probe: classifier of the pooled embedding.
        **options: of the method, for example ``steps`` of integrated gradients or ``layer`` of Grad-CAM; every method
            takes ``chunk``, the images of one forward pass.

    Returns:
        (B, H, W) or (B, h, w) float32; in [0, 1] when normalised.

    Raises:
        UserError: on an unknown method (the nearest is named), a target that the model cannot give, or images
            that are not normalised floats.
    """
    check_choice("size", size, ("input", "map"), UserError)
    model = getattr(model, "_orig_mod", model)
    maps = explain(model, images, method, target, probe=probe, **options).maps
    maps = enlarge(maps, images) if size == "input" else _reduce(maps, model, images)
    return to_unit(maps) if normalize else maps


def explain(
    model: nn.Module,
    images: Tensor,
    method: str = "gradcam",
    target: TargetLike = "self",
    *,
    probe: LinearProbe | None = None,
    **options: Any,
) -> Attribution:
    """The raw result of a method, with its completeness error. Arguments as in :func:`attribute`."""
    function = find_method(method)
    model = getattr(model, "_orig_mod", model)  # of torch.compile, whose parts nobody can listen to
    if images.ndim != 4 or not len(images) or not images.is_floating_point():
        raise UserError(
            f"images must be normalised floats (B, 3, H, W), not {images.dtype} {tuple(images.shape)}: "
            "see heatssl.data.normalise"
        )
    # Callers may be in inference mode, where no gradient can be taken, and so may their tensors.
    with torch.inference_mode(False), torch.enable_grad(), evaluation_mode(model), _each_layer_once(model):
        images = images.detach().clone()
        if isinstance(target, Tensor):
            target = target.detach().clone()
        result = function(model, images, make_target(model, images, target, probe), **options)
    if not torch.isfinite(result.maps).all():
        raise UserError(f"{method} gives NaN or infinity: the weights or the images are broken")
    return result


@contextmanager
def _each_layer_once(model: nn.Module) -> Iterator[None]:
    """Without gradient checkpointing: layers that run again in the backward pass are not those that were recorded."""
    checkpointed = bool(getattr(model, "grad_checkpointing", False))
    if checkpointed:
        model.set_grad_checkpointing(False)  # type: ignore[operator]
    try:
        yield
    finally:
        if checkpointed:
            model.set_grad_checkpointing(True)  # type: ignore[operator]


def method_names() -> list[str]:
    """All methods: the files of ``heatssl.attribution.methods``."""
    return sorted(module.name for module in pkgutil.iter_modules(methods.__path__))


def full_name(name: str) -> str:
    """``ig`` is what everybody calls integrated gradients; ``heat_flow:ig`` is heat_flow of them.

    ``heat_flow:`` names no base, and is ``heat_flow``.
    """
    return ":".join("integrated_gradients" if part == "ig" else part for part in name.rstrip(":").split(":"))


def find_method(name: str) -> Method:
    """The function of a method; ``heat_flow:rise`` is ``heat_flow`` with ``base="rise"``.

    Raises:
        UserError: when there is no such file (the nearest is named), or the method has no base.
    """
    name, _, base = full_name(name).partition(":")
    names = method_names()
    check_choice("attribution method", name, names, UserError)
    method: Method = getattr(importlib.import_module(f"{methods.__name__}.{name}"), name)
    if not base:
        return method
    if "base" not in inspect.signature(method).parameters:
        raise UserError(f"{name} has no base method: write {name!r}, or 'heat_flow:{base}'")
    return partial(method, base=base)


def to_unit(maps: Tensor) -> Tensor:
    """Magnitude, the largest of each image scaled to 1: (B, H, W) -> (B, H, W) in [0, 1]."""
    magnitude = maps.abs()
    largest = magnitude.amax(dim=(1, 2), keepdim=True)
    return torch.where(largest > 0, magnitude / largest, torch.zeros_like(magnitude))


def enlarge(maps: Tensor, images: Tensor) -> Tensor:
    """Maps (B, h, w) as large as images (B, 3, H, W), bilinear."""
    if maps.shape[1:] == images.shape[2:]:
        return maps
    return F.interpolate(maps[:, None], size=images.shape[2:], mode="bilinear", align_corners=False)[:, 0]


def _reduce(maps: Tensor, model: nn.Module, images: Tensor) -> Tensor:
    if maps.shape[1:] != images.shape[2:]:
        return maps
    if not hasattr(model, "forward_features"):
        raise UserError(f"{type(model).__name__} is no timm model and has no feature map: use size='input'")
    with torch.no_grad(), evaluation_mode(model):
        rows, columns = feature_map(model, images[:1]).shape[2:]
    height, width = maps.shape[1:]
    mean = F.adaptive_avg_pool2d(maps[:, None], (rows, columns))[:, 0]
    return mean * (height * width / (rows * columns))
