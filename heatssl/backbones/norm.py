"""RMS norm as the backbones have it, for exporters that do not know it as well."""

from typing import Any

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from heatssl.ops import rms_norm


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), times the weights if there are any: (..., d) -> (..., d).

    What torch's makes, but for rounding. In plain operations only while a graph is exported to ONNX, since the exporter
    of TorchScript graphs (timm's ``onnx_export`` by default) has no ``rms_norm``.

    Args:
        width: d.
        before_linear: whether a linear layer alone reads it, which takes autocast's type.
        **settings: of :class:`torch.nn.RMSNorm`.
    """

    def __init__(self, width: int, *, before_linear: bool = False, **settings: Any) -> None:
        super().__init__(width, **settings)
        self.before_linear = before_linear

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():
            return self.plain(x) if torch.onnx.is_in_onnx_export() else self.fused(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    @torch.jit.unused
    def fused(self, x: Tensor) -> Tensor:
        """Keeps nothing for the backward pass that the layer behind it would not keep."""
        assert self.eps is not None
        return rms_norm(x, self.weight, self.eps, narrow=self.before_linear)

    @torch.jit.unused
    def plain(self, x: Tensor) -> Tensor:
        """The formula."""
        assert self.eps is not None
        scaled = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return scaled if self.weight is None else scaled * self.weight


register_notrace_module(RMSNorm)  # branches on who runs it
