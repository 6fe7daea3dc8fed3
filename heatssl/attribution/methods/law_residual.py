"""Where an image breaks a law of heat: the residual of its final feature map."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields
from heatssl.attribution.targets import Target
from heatssl.errors import UserError
from heatssl.heat import Laplace, Law
from heatssl.ops import full_precision


@torch.no_grad()
def law_residual(
    model: nn.Module,
    images: Tensor,
    target: Target,  # noqa: ARG001 - every method has the same signature
    *,
    law: Law | None = None,
    layer: Layer = None,
    chunk: int = 64,
) -> Attribution:
    """How far the features of each position are from what a law says, mean over channels of the squared residual.

    With Laplace's equation (the default) it is |z_xx + z_yy|^2 / C: zero where features are the mean of those around
    them, large at edges and at small things. The target plays no part.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: not looked at.
        law: of :mod:`heatssl.heat`, made for as many channels as the map has, on the device of the images; None:
            ``Laplace(boundary="replicate")``.
        layer: module (or its dotted name) whose output is used; None: the final map.
        chunk: images per forward pass.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: on a law for other channels, or one that says nothing about the border; on a layer that is not there,
            or has no grid of positions.
    """
    law = Laplace(boundary="replicate") if law is None else law
    maps = []
    for field in fields(model, images, layer, chunk):
        try:
            with full_precision(field):
                residual = law.residual(field)
        except ValueError as error:
            raise UserError(f"law= does not fit the map of {type(model).__name__}: {error}") from error
        if residual.shape[1:] != field.shape[2:]:
            raise UserError("law= says nothing about the border of the map: give it boundary='replicate' or 'reflect'")
        maps.append(residual)
    return Attribution(torch.cat(maps))
