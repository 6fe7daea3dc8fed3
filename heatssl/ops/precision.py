"""Where half precision must not reach: differences of neighbours cancel, and steps near the identity round to it."""

import torch
from torch import Tensor


def full_precision(tensor: Tensor) -> torch.autocast:
    """Within this context float32 stays float32 on the device of ``tensor``, whatever autocast stands around."""
    return torch.autocast(tensor.device.type, enabled=False)
