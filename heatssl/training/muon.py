"""timm's Muon, all matrices of one shape at once: one by one, a GPU waits for hundreds of small launches."""

import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import timm.optim
import torch
from timm.optim.muon import muon
from torch import Tensor

SETTINGS = set(inspect.signature(muon).parameters) - {"params"}  # of a group: what timm's function takes of it


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
        """Muon on matrices (m, n) of one shape, as timm has it for the k places of a convolution (m, n, k)."""
        states = [self.state[parameter] for parameter in parameters]
        for parameter, state in zip(parameters, states, strict=True):
            state["use_muon"] = True
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
        buffers = [state["momentum_buffer"] for state in states]
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        stacks = [torch.stack(tensors).permute(1, 2, 0) for tensors in (parameters, gradients, buffers)]
        settings = {name: group[name] for name in SETTINGS if name in group}
        settings |= {"conv_mode": "batched", "normalize_spatial": False}
        muon(*([stack] for stack in stacks), **settings)
        for tensors, stack in ((parameters, stacks[0]), (buffers, stacks[2])):
            torch._foreach_copy_(tensors, list(stack.unbind(-1)))
