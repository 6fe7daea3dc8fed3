"""Fused operations: one dispatch each, the same numbers on every device."""

from heatssl.ops.attention import attention, attention_weights
from heatssl.ops.precision import full_precision
from heatssl.ops.propagate import by_corner, fill_quarters_commuting, fill_quarters_full, turn
from heatssl.ops.residual_loss import Backend, residual_loss, residual_loss_and_map
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
    "residual_loss",
    "residual_loss_and_map",
    "turn",
]
