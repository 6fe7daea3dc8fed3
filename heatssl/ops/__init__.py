"""Fused operations: one dispatch each, the same numbers on every device."""

from heatssl.ops.attention import attention, attention_weights
from heatssl.ops.gating import gated_linear, silu_product
from heatssl.ops.precision import full_precision
from heatssl.ops.propagate import by_corner, fill_quarters_commuting, fill_quarters_full, turn
from heatssl.ops.recomputation import recompute
from heatssl.ops.residual_loss import Backend, residual_loss, residual_loss_and_map
from heatssl.ops.rms_norm import rms_norm
from heatssl.ops.stencil import Boundary, accumulator, check_boundary, depthwise_stencil

__all__ = [
    "Backend",
    "Boundary",
    "accumulator",
    "attention",
    "attention_weights",
    "by_corner",
    "check_boundary",
    "depthwise_stencil",
    "fill_quarters_commuting",
    "fill_quarters_full",
    "full_precision",
    "gated_linear",
    "recompute",
    "residual_loss",
    "residual_loss_and_map",
    "rms_norm",
    "silu_product",
    "turn",
]
