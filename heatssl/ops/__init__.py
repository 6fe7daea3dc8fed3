"""Fused operations on fields: one dispatch, the same numbers on every device."""

from heatssl.ops.stencil import Boundary, depthwise_stencil

__all__ = ["Boundary", "depthwise_stencil"]
