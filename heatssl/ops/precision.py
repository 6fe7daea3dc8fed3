"""Where half precision must not reach: differences of neighbours cancel, and steps near the identity round to it.

And what the world around a call asks of it.
"""

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """Within this context float32 stays float32 on the device of ``tensor``, whatever autocast stands around."""
    return torch.autocast(tensor.device.type, enabled=False)


def autocast_type(tensor: Tensor) -> torch.dtype | None:
    """The type that autocast asks for on the device of ``tensor``; None: it does not stand around."""
    device = tensor.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return None


@torch.jit.unused
def traced() -> bool:
    """Whether a graph is being made of the operations, which must then be torch's own."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
