"""Grad-CAM (Selvaraju et al., ICCV 2017, arXiv 1610.02391), for convolutional and token models."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.targets import Target
from heatssl.backbones import as_field
from heatssl.errors import UserError


def gradcam(
    model: nn.Module, images: Tensor, target: Target, *, layer: str | nn.Module | None = None, chunk: int = 64
) -> Attribution:
    """Channels of a feature map, weighted by the mean of their gradient.

    alpha_c = mean over positions of dy / dA_c (eq. 1), map = ReLU(sum over c of alpha_c A_c) (eq. 2).

    Of the final map of a mean-pooled target this is the exact share of each position in the score, rectified:
    the gradient is the same everywhere. A classifier that reads the class token gives the final patch tokens
    no gradient at all; there the map is taken where the last block's attention reads it.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: what to explain.
        layer: module (or its dotted name) whose output is used: (B, C, h, w), or tokens (B, prefix + n, C).
            None chooses the final map, or the last block's first norm for a class token classifier.
        chunk: images per forward pass.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: on a layer that is not there, does not take part, or has no grid of positions.
    """
    if layer is None and target.uses_classifier and _reads_class_token(model):
        layer = model.blocks[-1].norm1  # type: ignore[index, union-attr]
    maps = []
    for owner in torch.arange(len(images), device=images.device).split(chunk):
        points = images[owner].detach().requires_grad_()
        with _recorded(model, layer) as outputs:
            score = target(points, owner, local=True)
        if not outputs:
            raise UserError("the layer chosen for Grad-CAM takes no part in this target: choose another layer=")
        activation = outputs[-1]
        (gradient,) = torch.autograd.grad(score.sum(), activation, allow_unused=True)
        if gradient is None:
            raise UserError("the target does not depend on the layer chosen for Grad-CAM: choose an earlier layer=")
        field, slope = (as_field(model, tensor.detach().float(), images) for tensor in (activation, gradient))
        weight = slope.mean(dim=(2, 3), keepdim=True)
        maps.append((weight * field).sum(dim=1).relu())
    return Attribution(torch.cat(maps))


@contextmanager
def _recorded(model: nn.Module, layer: str | nn.Module | None) -> Iterator[list[Tensor]]:
    """Collects the outputs of a layer within the block; None stands for the model's ``forward_features``."""
    outputs: list[Tensor] = []
    if layer is None:
        features = getattr(model, "forward_features", None)
        if features is None:
            raise UserError(f"{type(model).__name__} is no timm model: name the feature map with layer=")
        # forward_features is a method, no module, so it takes no hook: shadow it on this one object for a
        # while.
        setattr(model, "forward_features", _recording(features, outputs))  # noqa: B010 - typed as a submodule
        try:
            yield outputs
        finally:
            del model.forward_features
        return
    handle = _module(model, layer).register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
    try:
        yield outputs
    finally:
        handle.remove()


def _recording(function: Callable[..., Tensor], outputs: list[Tensor]) -> Callable[..., Tensor]:
    @wraps(function)
    def recorded(*arguments: Any, **options: Any) -> Tensor:
        outputs.append(function(*arguments, **options))
        return outputs[-1]

    return recorded


def _module(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    try:
        return model.get_submodule(layer)
    except AttributeError:
        last = [name for name, _ in model.named_modules() if name.count(".") <= 1][-5:]
        raise UserError(f"{type(model).__name__} has no layer {layer!r}; its last ones are {', '.join(last)}") from None


def _reads_class_token(model: nn.Module) -> bool:
    """Whether the classifier of a timm vision transformer leaves its final patch tokens unread."""
    return hasattr(model, "blocks") and getattr(model, "global_pool", None) == "token"
