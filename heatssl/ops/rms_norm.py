"""RMS norm that keeps its output for the backward pass, which the linear layer behind it keeps anyway.

    y = w x / r,  r^2 = mean(x^2) + eps;    dx = (w dy - (y / w) mean(y dy)) / r,    dw = sum(y dy) / w

so that neither x nor x / r has to be kept. What comes back from y / w must not have been lost in y: weights count as
1e-12 at least.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops.surroundings import autocast_type, must_be_plain

_SMALLEST = 1e-12  # of weights; float16, which begins at 6e-8, takes torch's form


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, *, narrow: bool = False) -> Tensor:
    """Divide by the root of the mean square of the last axis: w x / sqrt(mean(x^2) + eps).

    Args:
        x: (..., d).
        weight: w, (d,); None: ones.
        eps: added to the mean.
        narrow: under autocast give its type, as a linear layer would ask for, and not float32.

    Returns:
        (..., d), in the type of x but under autocast.
    """
    if must_be_plain():
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    asked = autocast_type(x)
    wanted = x.dtype if asked is None else asked if narrow else torch.promote_types(x.dtype, torch.float32)
    if torch.float16 in (x.dtype, wanted):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    ones = x.new_ones(x.shape[-1]) if weight is None else weight
    y: Tensor = _RMSNorm.apply(x, ones, eps, wanted)[0]
    return y


class _RMSNorm(torch.autograd.Function):
    """x, w, eps, type -> y and 1 / r: both outputs, so that the gradient can be differentiated again."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, eps: float, wanted: torch.dtype) -> tuple[Tensor, Tensor]:
        wide = x if x.dtype == torch.float64 else x.float()
        inverse = (torch.linalg.vector_norm(wide, dim=-1, keepdim=True).square() / x.shape[-1] + eps).rsqrt()
        return (wide * inverse).mul_(_bounded(weight)).to(wanted), inverse

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)
        ctx.type = inputs[0].dtype
        ctx.save_for_backward(inputs[1], *output)

    @staticmethod
    def backward(ctx: Any, by_y: Tensor | None, by_inverse: Tensor | None) -> tuple[Tensor | None, ...]:
        weight, y, inverse = ctx.saved_tensors
        bounded, wide = _bounded(weight), y.to(inverse.dtype)
        by_x = by_weight = None
        if by_y is not None:
            upstream = by_y.to(wide.dtype)
            both, by_x = upstream * wide, upstream * bounded
            by_x = by_x.addcmul_(wide / bounded, both.mean(dim=-1, keepdim=True), value=-1).mul_(inverse)
            if ctx.needs_input_grad[1]:
                by_weight = (both.reshape(-1, both.shape[-1]).sum(dim=0) / bounded).to(weight.dtype)
        if by_inverse is not None:  # in second derivatives alone
            by_root = -by_inverse * inverse.square() * (wide / bounded) / y.shape[-1]
            by_x = by_root if by_x is None else by_x + by_root
        return None if by_x is None else by_x.to(ctx.type), by_weight, None, None


def _bounded(weight: Tensor) -> Tensor:
    return torch.where(weight.abs() < _SMALLEST, torch.full_like(weight, _SMALLEST), weight)
