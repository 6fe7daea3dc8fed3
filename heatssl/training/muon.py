"""timm's Muon, all matrices of one shape at once: one by one, a GPU waits for hundreds of small launches."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim.muon import _COEFFICIENTS, get_lr_scale, resolve_ns_coefficients, zeropower_via_newtonschulz
from torch import Tensor


class StackedMuon(timm.optim.Muon):
    """The same steps as timm's, within rounding; groups marked ``use_fallback`` are left to it, as AdamW's.

    State is kept by parameter, as timm keeps it: a checkpoint of either is one of the other.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every parameter that has a gradient; what the closure returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        moved: list[tuple[Tensor, Tensor | None]] = []
        for group in self.param_groups:
            if group.get("use_fallback"):
                continue
            alike: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._step_together(group, parameters)
                moved += [(parameter, parameter.grad) for parameter in parameters]
        for parameter, _ in moved:
            parameter.grad = None  # timm leaves alone what has none
        super().step()
        for parameter, gradient in moved:
            parameter.grad = gradient
        return loss

    def _step_together(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        """Muon on matrices (m, n) of one shape."""
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            state["use_muon"] = True
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        buffers = [state["momentum_buffer"] for state in states]
        torch._foreach_lerp_(buffers, gradients, 1 - group["momentum"])
        updates = torch._foreach_lerp(gradients, buffers, group["momentum"]) if group["nesterov"] else buffers
        orthogonal = zeropower_via_newtonschulz(
            torch.stack(list(updates)),
            group["ns_steps"],
            resolve_ns_coefficients(group["ns_coefficients"], _COEFFICIENTS),
            eps=group["eps"],
            safety_factor=group["safety_factor"],
            dtype=type_of_products(parameters[0].device),
            scale_eps=group["scale_eps"],
        )
        size = group["lr"] * get_lr_scale(parameters[0].shape, group["adjust_lr_fn"])
        torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(parameters, list(orthogonal.to(parameters[0].dtype).unbind()), alpha=-size)


def type_of_products(device: torch.device) -> torch.dtype:
    """bfloat16, which is enough for Newton and Schulz's iteration; float32 on a CPU that has no instructions for it.

    There, with AVX2 alone, products of bfloat16 took 15 to 50 times as long: three quarters of a small run's time.
    """
    if device.type == "cpu" and torch.backends.cpu.get_cpu_capability() != "AVX512":
        return torch.float32
    return torch.bfloat16
