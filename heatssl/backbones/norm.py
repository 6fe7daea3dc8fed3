"""torch's RMSNorm, for exporters that do not know it."""

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps), times the weights if there are any: (..., d) -> (..., d).

    The same numbers as torch's, and its fused form; in plain operations only while a graph is exported to ONNX, since
    the exporter of TorchScript graphs (timm's ``onnx_export`` by default) has no ``rms_norm``.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not torch.jit.is_scripting():  # noqa: SIM102 (the compiler of scripts passes over what is inside)
            if torch.onnx.is_in_onnx_export():
                return self.plain(x)
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)

    @torch.jit.unused
    def plain(self, x: Tensor) -> Tensor:
        """The formula."""
        assert self.eps is not None
        scaled = x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + self.eps)
        return scaled if self.weight is None else scaled * self.weight


register_notrace_module(RMSNorm)  # branches on who runs it
