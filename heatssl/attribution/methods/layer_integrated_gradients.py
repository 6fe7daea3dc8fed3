"""Integrated gradients of a layer's output (Sundararajan, Taly and Yan, ICML 2017, arXiv 1703.01365)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution, completeness_error
from heatssl.attribution.layers import Layer, default_layer, intercepted, of_images
from heatssl.attribution.points import owners, scores
from heatssl.attribution.targets import Target
from heatssl.errors import UserError


def layer_integrated_gradients(
    model: nn.Module, images: Tensor, target: Target, *, layer: Layer = None, steps: int = 32, chunk: int = 64
) -> Attribution:
    """Gradient along the straight path between a layer's outputs for the mean colour and for the image, times the step.

    map = sum over channels of (A - A') times the mean over k of dF/dA at A' + (k - 1/2) / steps (A - A'): integrated
    gradients (eq. 3, midpoint rule) of what stands behind the layer, as captum's ``LayerIntegratedGradients``.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: the function F.
        layer: see :func:`heatssl.attribution.layers.fields_and_gradients`.
        steps: points on the path.
        chunk: images per forward pass; what stands before the layer is run in each.

    Returns:
        Signed maps (B, h, w), and the completeness error as in integrated gradients; it counts what falls to the class
        token, which the map leaves out.

    Raises:
        UserError: on a layer that is not there, does not take part, or has no grid of positions.
    """
    layer = default_layer(model, target) if layer is None else layer
    end, start = (_output(model, target, points, layer, chunk) for points in (images, torch.zeros_like(images)))
    gradient = torch.zeros_like(end, dtype=torch.float32)
    for owner, step in owners(images, chunk, steps):
        position = ((step + 0.5) / steps).to(end.dtype).reshape(-1, *[1] * (end.ndim - 1))
        between = torch.lerp(start[owner], end[owner], position).requires_grad_()

        def replace(_: Tensor, between: Tensor = between) -> Tensor:
            torch.set_grad_enabled(True)
            return between.clone()  # the next layer may work in place, which a leaf does not allow

        with torch.no_grad(), intercepted(model, layer, replace):
            score = target(images[owner], owner)
        gradient.index_add_(0, owner, torch.autograd.grad(score.sum(), between)[0].float())
    share = (end.float() - start.float()) * gradient / steps
    rise = scores(target, images, chunk) - scores(target, torch.zeros_like(images), chunk)
    return Attribution(of_images(model, share, images).sum(dim=1), completeness_error(share, rise))


@torch.no_grad()
def _output(model: nn.Module, target: Target, images: Tensor, layer: Layer, chunk: int) -> Tensor:
    """What the layer returns for all images, as it lays it out."""
    found = []
    for owner, _ in owners(images, chunk):
        outputs: list[Tensor] = []
        with intercepted(model, layer, lambda output, outputs=outputs: outputs.append(output.clone()) or output):  # type: ignore[misc]
            target(images[owner], owner)
        if not outputs:
            raise UserError("the chosen layer takes no part in this target: choose another layer=")
        of_images(model, outputs[-1], images[owner])  # refuses what is no grid before a path goes through it
        found.append(outputs[-1])
    return torch.cat(found)
