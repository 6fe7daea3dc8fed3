"""Eigen-CAM (Muhammad and Yeasin, IJCNN 2020, arXiv 2008.00299)."""

import torch
from torch import Tensor, nn

from heatssl.attribution.attribution import Attribution
from heatssl.attribution.layers import Layer, fields
from heatssl.attribution.targets import Target
from heatssl.ops import full_precision


def eigencam(
    model: nn.Module,
    images: Tensor,
    target: Target,  # noqa: ARG001 - every method has the same signature
    *,
    layer: Layer = None,
    chunk: int = 64,
) -> Attribution:
    """How far the features of a position lie along the direction in which those of its image differ most.

    map = ReLU((A - mean) v), A the positions x channels matrix, v the first right singular vector of A - mean. The
    target plays no part. The paper leaves the mean in; without it v is a direction of change, as in pytorch-grad-cam.
    The sign of v is free: it is chosen so that the largest magnitude is positive.

    Args:
        model: in evaluation mode.
        images: normalised (B, 3, H, W).
        target: not looked at.
        layer: module (or its dotted name) whose output is used; None: the final map.
        chunk: images per forward pass.

    Returns:
        Maps (B, h, w) >= 0; no completeness error.

    Raises:
        UserError: on a layer that is not there, or has no grid of positions.
    """
    return Attribution(torch.cat([_first_component(field) for field in fields(model, images, layer, chunk)]))


def _first_component(field: Tensor) -> Tensor:
    """Fields (B, C, h, w) -> maps (B, h, w)."""
    samples = field.flatten(2).mT  # B n C
    samples = samples - samples.mean(dim=1, keepdim=True)
    with full_precision(samples):
        # With A = U S V^T the map is A v = s u: it comes from the smaller of A A^T and A^T A.
        if samples.shape[1] <= samples.shape[2]:
            values, vectors = torch.linalg.eigh(samples @ samples.mT)
            projected = vectors[..., -1] * values[:, -1:].clamp_min(0).sqrt()
        else:
            _, vectors = torch.linalg.eigh(samples.mT @ samples)
            projected = (samples @ vectors[..., -1:]).squeeze(-1)
    is_negative = projected.amax(dim=1, keepdim=True) < -projected.amin(dim=1, keepdim=True)
    return torch.where(is_negative, -projected, projected).relu().unflatten(1, tuple(field.shape[2:]))
