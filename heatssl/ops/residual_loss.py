"""The mean squared response of a 3x3 stencil on a field, fused with its gradient; one dispatch over three backends."""

import os
import warnings
from functools import lru_cache
from types import ModuleType
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from heatssl.errors import check_choice
from heatssl.ops.stencil import (
    Boundary,
    Weights,
    accumulator,
    check_field,
    check_stencil,
    depthwise_stencil,
    weights_of,
)
from heatssl.ops.surroundings import must_be_plain

Backend = Literal["auto", "eager", "compiled", "triton"]
SMALL = 2**18  # elements below which an eager loss costs less than the seconds of a compilation ever win back


def residual_loss(z: Tensor, stencil: Tensor, boundary: Boundary = "interior", backend: Backend = "auto") -> Tensor:
    """Mean over fields, channels and positions of the squared stencil response.

    Equal to ``depthwise_stencil(z, stencil, boundary).square().mean()``, without the intermediate tensors and, in
    float16 and bfloat16, with sums in float32. No residual is stored for the backward pass: on a CPU one sweep makes
    loss and gradient together; on a GPU the backward pass reads z again and applies the stencil's adjoint.

    Args:
        z: field (B, C, H, W), floating point; contiguous and channels_last are fused, other layouts are not.
        stencil: weights (3, 3), as in :func:`heatssl.ops.depthwise_stencil`; no gradient.
        boundary: see there.
        backend: ``auto`` takes Triton on CUDA, C++ for large fields on a CPU, compiled on the first call, and else the
            eager reference, which is also what remains, after one warning, where compiling fails.

    Returns:
        Scalar, float32 (float64 for float64). A gradient that is differentiated again (``create_graph=True``) is the
        eager reference's, whatever the backend.

    Raises:
        ValueError: on an unknown boundary or backend, a stencil that is not (3, 3) or requires a gradient, or a field
            without four dimensions or too small for the boundary.
    """
    chosen = _checked(z, stencil, boundary, backend)
    if chosen == "eager":
        return _eager(z, stencil, boundary)
    return _ResidualLoss.apply(z.resolve_neg(), weights_of(stencil), boundary, chosen)


def residual_loss_and_map(
    z: Tensor, stencil: Tensor, boundary: Boundary = "interior", backend: Backend = "auto"
) -> tuple[Tensor, Tensor]:
    """:func:`residual_loss`, and where it comes from.

    Returns:
        The loss, and the squared response, mean over channels: (B, H-2, W-2) for ``interior``, else (B, H, W);
        float32 (float64 for float64), detached. Triton makes both in one read of z; on a CPU the map is a second.
    """
    chosen = _checked(z, stencil, boundary, backend)
    if chosen == "triton":
        loss, residual = _ResidualLossAndMap.apply(z.resolve_neg(), weights_of(stencil), boundary)
        return loss, residual
    with torch.no_grad():
        wide = z.to(accumulator(z.dtype))
        residual = depthwise_stencil(wide, stencil, boundary).square().mean(dim=1)
    return residual_loss(z, stencil, boundary, chosen), residual


def _eager(z: Tensor, stencil: Tensor, boundary: Boundary) -> Tensor:
    return depthwise_stencil(z.to(accumulator(z.dtype)), stencil, boundary).square().mean()


def _checked(z: Tensor, stencil: Tensor, boundary: Boundary, backend: Backend) -> Backend:
    """The backend that will run, once all arguments are right; the stencil's numbers are not looked at."""
    check_choice("backend", backend, get_args(Backend))
    if z.ndim != 4 or not z.is_floating_point():
        raise ValueError(f"a field is a floating-point tensor (B, C, H, W), not {tuple(z.shape)} of {z.dtype}")
    check_field(z, boundary)
    check_stencil(stencil)
    return _choose(z, backend)


def _choose(z: Tensor, backend: Backend) -> Backend:
    """The backend that will run; what is asked for but cannot run becomes eager."""
    if backend == "eager" or z.numel() == 0 or must_be_plain():
        return "eager"
    if backend == "triton" or (backend == "auto" and z.is_cuda):
        runs = z.is_cuda or "TRITON_INTERPRET" in os.environ
        return "triton" if runs and _load_triton() else "eager"
    if z.is_cuda or (backend == "auto" and (z.device.type != "cpu" or z.numel() < SMALL)):
        return "eager"
    from heatssl.ops import compiled

    return "compiled" if compiled.fits(z) and _load_compiled() else "eager"


class _ResidualLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Weights, boundary: Boundary, backend: Backend) -> Tensor:
        ctx.weights, ctx.boundary, ctx.backend = weights, boundary, backend
        ctx.save_for_backward(z)
        # float16 has too small a range for a gradient without its loss scale, which is known only backward.
        ctx.gradient = None
        if backend == "compiled" and ctx.needs_input_grad[0] and z.dtype != torch.float16:
            loss, ctx.gradient = _kernels(backend).loss_and_gradient(z, weights, boundary)
            return loss
        return _kernels(backend).loss(z, weights, boundary)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            return _differentiable(z, ctx.weights, ctx.boundary, upstream), None, None, None
        gradient, ctx.gradient = ctx.gradient, None  # ours alone, so it is scaled in place; a second call sweeps again
        if gradient is None:
            gradient = _kernels(ctx.backend).gradient(z, ctx.weights, ctx.boundary, upstream)
            return gradient, None, None, None
        return gradient if upstream.item() == 1 else gradient.mul_(upstream), None, None, None


class _ResidualLossAndMap(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Weights, boundary: Boundary) -> tuple[Tensor, Tensor]:
        ctx.weights, ctx.boundary = weights, boundary
        ctx.save_for_backward(z)
        loss, residual = _kernels("triton").loss_and_map(z, weights, boundary)
        ctx.mark_non_differentiable(residual)
        return loss, residual

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (z,) = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(z, ctx.weights, ctx.boundary, upstream), None, None
        return _kernels("triton").gradient(z, ctx.weights, ctx.boundary, upstream), None, None


def _differentiable(z: Tensor, weights: Weights, boundary: Boundary, upstream: Tensor) -> Tensor:
    """The gradient, with a graph of its own."""
    stencil = torch.tensor(weights, dtype=torch.float64).view(3, 3)
    (gradient,) = torch.autograd.grad(_eager(z, stencil, boundary), z, upstream, create_graph=True)
    return gradient


def _kernels(backend: Backend) -> ModuleType:
    module = _load_triton() if backend == "triton" else _load_compiled()
    assert module is not None, "chosen only where it loads"
    return module


@lru_cache(maxsize=1)
def _load_triton() -> ModuleType | None:
    try:
        from heatssl.ops import residual_loss_triton
    except ImportError as error:
        warnings.warn(f"no Triton ({error}): the eager residual loss takes over", stacklevel=2)
        return None
    return residual_loss_triton


@lru_cache(maxsize=1)
def _load_compiled() -> ModuleType | None:
    from heatssl.ops import compiled

    try:
        compiled.library()
    except Exception as error:  # noqa: BLE001 (compilers, caches and headers fail in many ways; a run must go on)
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        fix = "" if compiled.compiler() else "; install a C++ compiler (g++ or clang++) to get the fast one"
        warnings.warn(
            f"the fused residual loss could not be compiled ({reason}): the eager one takes over{fix}", stacklevel=2
        )
        return None
    return compiled
