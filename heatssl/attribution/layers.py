"""What methods need of a layer: its output as a field, the target's gradient there, or another output in its place.

The graph of the gradient begins at the layer. What stands before it is run without one, so that the backward pass, and
what is kept for it, are those of the few layers behind.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from heatssl.attribution.points import owners
from heatssl.attribution.targets import Target
from heatssl.backbones import as_field, feature_map
from heatssl.backbones.fields import field_or_none
from heatssl.errors import UserError

# A module or its dotted name; None: the final map, see default_layer.
Layer = str | nn.Module | None


def fields_and_gradients(
    model: nn.Module, images: Tensor, target: Target, layer: Layer, chunk: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """A layer's output, and the gradient of each image's score there.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: what is differentiated, as a local method does.
        layer: module (or its dotted name) whose output is (B, C, h, w), or tokens (B, prefix + n, C). None: see
            :func:`default_layer`.
        chunk: images per forward pass.

    Yields:
        field and gradient of each chunk, (n, C, h, w) float32.

    Raises:
        UserError: on a layer that is not there, does not take part, or has no grid of positions.
    """
    layer = default_layer(model, target) if layer is None else layer
    for owner, _ in owners(images, chunk):
        points = images[owner]
        leaves: list[Tensor] = []

        def begin(output: Tensor, leaves: list[Tensor] = leaves) -> Tensor:
            leaves.append(output.detach().requires_grad_())
            torch.set_grad_enabled(True)
            return leaves[-1].clone()  # the next layer may work in place, which a leaf does not allow

        with torch.no_grad(), intercepted(model, layer, begin):
            score = target(points, owner, local=True)
        if not leaves:
            raise UserError("the chosen layer takes no part in this target: choose another layer=")
        gradient = None
        if score.requires_grad:
            (gradient,) = torch.autograd.grad(score.sum(), leaves[-1], allow_unused=True)
        if gradient is None:
            raise UserError("the target does not depend on the chosen layer: choose an earlier layer=")
        field, slope = (of_images(model, tensor.detach(), points) for tensor in (leaves[-1], gradient))
        if gradient.any() and not slope.any():
            raise UserError("the target reads the class token alone of the chosen layer: choose an earlier layer=")
        yield field, slope


@torch.no_grad()
def fields(model: nn.Module, images: Tensor, layer: Layer, chunk: int) -> Iterator[Tensor]:
    """A layer's output in each chunk of the images, (n, C, h, w) float32; None: the final map.

    Raises:
        UserError: as :func:`fields_and_gradients`.
    """
    for points in images.split(chunk):
        if layer is None:
            _check_has_final_map(model)
            yield feature_map(model, points).float()
            continue
        outputs: list[Tensor] = []
        with intercepted(model, layer, lambda output, outputs=outputs: outputs.append(output) or output):  # type: ignore[misc]
            model(points)
        if not outputs:
            raise UserError("the chosen layer takes no part in the forward pass: choose another layer=")
        yield of_images(model, outputs[-1], points)


def of_images(model: nn.Module, output: Tensor, images: Tensor) -> Tensor:
    """What a layer returns for a batch of images as a field (B, C, h, w) float32.

    Raises:
        UserError: when it is no grid of positions, or there is not one of each image.
    """
    if len(output) != len(images):
        raise UserError(
            f"a layer of {type(model).__name__} returns {tuple(output.shape)} for {len(images)} images, windows or "
            "heads: choose another layer"
        )
    return as_field(model, output.float(), images)


def default_layer(model: nn.Module, target: Target) -> Layer:
    """The last layer whose positions the target reads: the final map (None) in all cases but one.

    A classifier that reads the class token gives the final patch tokens no gradient at all. There it is the last
    block's first norm, where attention reads them.
    """
    if target.uses_classifier and reads_class_token(model):
        return model.blocks[-1].norm1  # type: ignore[index, union-attr]
    return None


def reads_class_token(model: nn.Module) -> bool:
    """Whether the classifier of a timm vision transformer leaves its final patch tokens unread."""
    blocks = getattr(model, "blocks", None)
    return isinstance(blocks, nn.Sequential | nn.ModuleList) and (
        getattr(model, "global_pool", None) == "token" and hasattr(blocks[-1], "norm1")
    )


@contextmanager
def intercepted(model: nn.Module, layer: Layer, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within the block, a layer's output is what ``change`` makes of it; None stands for the final map.

    Raises:
        UserError: on a layer that is not there, or one that returns something else than a tensor.
    """
    if layer is None and isinstance(model, VisionTransformer | Eva):
        layer = model.norm  # where forward_features ends, and images of another size, which it refuses, end as well
    if layer is not None:
        handle = _module(model, layer).register_forward_hook(lambda *call: change(_tensor(call[-1])))
        try:
            yield
        finally:
            handle.remove()
        return
    _check_has_final_map(model)
    forward_features: Callable[..., Any] = model.forward_features  # type: ignore[assignment]
    forward_intermediates: Callable[..., Any] | None = getattr(model, "forward_intermediates", None)

    @wraps(forward_features)
    def changed(images: Tensor, *arguments: Any, **options: Any) -> Any:
        output = forward_features(images, *arguments, **options)
        # Where it is no map, feature_map looks for one in forward_intermediates.
        is_map = forward_intermediates is None or field_or_none(model, output, images) is not None
        return change(_tensor(output)) if is_map else output

    def changed_intermediates(*arguments: Any, **options: Any) -> list[Tensor]:
        assert forward_intermediates is not None  # else it is not in the place of anything
        return [change(_tensor(output)) for output in forward_intermediates(*arguments, **options)]

    # These are methods, no modules, so they take no hook: shadow them on this one object for a while.
    shadows: dict[str, Callable[..., Any]] = {"forward_features": changed}
    if forward_intermediates is not None:
        shadows["forward_intermediates"] = changed_intermediates
    for name, shadow in shadows.items():
        setattr(model, name, shadow)
    try:
        yield
    finally:
        for name in shadows:
            delattr(model, name)


def _check_has_final_map(model: nn.Module) -> None:
    if not hasattr(model, "forward_features"):
        raise UserError(f"{type(model).__name__} is no timm model: name the feature map with layer=")


def _tensor(output: object) -> Tensor:
    if not isinstance(output, Tensor):
        raise UserError(f"the chosen layer returns a {type(output).__name__}, no tensor: choose another layer=")
    return output


def _module(model: nn.Module, layer: str | nn.Module) -> nn.Module:
    if isinstance(layer, nn.Module):
        return layer
    try:
        return model.get_submodule(layer)
    except AttributeError:
        last = [name for name, _ in model.named_modules() if name.count(".") <= 1][-5:]
        raise UserError(f"{type(model).__name__} has no layer {layer!r}; its last ones are {', '.join(last)}") from None
