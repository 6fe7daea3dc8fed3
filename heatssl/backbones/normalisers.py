"""From scores to attention weights, and what keeps them right when the number of tokens changes.

* ``relu2``: relu(a)^2 / n, a = q k / sqrt(s), n the number of keys (FLASH, arXiv 2202.10447, eq. 7 as 1 / (n s));
* ``relu2_fixed``: the same with n fixed at the length of training (kexue.fm 9019: other lengths then do better);
* ``softmax``: softmax(a);
* ``softmax_plus``: softmax(a log n / log N), N the length of training, for which both are the same; the entropy of
  the weights then hardly depends on n (kexue.fm 8823; GAU-alpha, which counts fewer than 16 keys as 16).

A model that was trained with ``softmax`` can have the factor at evaluation alone, where it is at least 1
(``log_n_at_test``, kexue.fm 9708).
"""

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

Kind = Literal["relu2", "relu2_fixed", "softmax", "softmax_plus"]
_FEWEST = 16  # keys, GAU-alpha


@dataclass(frozen=True)
class NormaliserSettings:
    """How scores become weights.

    Attributes:
        kind: see the module's text.
        length: N, keys at training.
        log_n_at_test: softmax: multiply scores by max(1, log n / log N) in evaluation mode.

    Raises:
        ValueError: on an unknown kind, a length below 1, or a factor at test for another kind than softmax.
    """

    kind: Kind = "softmax_plus"
    length: int = 196
    log_n_at_test: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"normaliser must be one of {', '.join(get_args(Kind))}, not {self.kind!r}")
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")
        if self.log_n_at_test and self.kind != "softmax":
            raise ValueError(f"log_n_at_test is for normaliser=softmax, not {self.kind}")


class Normaliser(nn.Module):
    """Scores -> weights; has no parameters.

    Args:
        width: s of queries and keys.
        settings: see :class:`NormaliserSettings`.
    """

    def __init__(self, width: int, settings: NormaliserSettings) -> None:
        super().__init__()
        self.scale = width**-0.5
        self.change(settings)

    def change(self, settings: NormaliserSettings) -> None:
        """Use other settings from now on."""
        self.settings = settings
        self.kind: str = settings.kind
        self.length = settings.length
        self.log_length = math.log(max(settings.length, _FEWEST))
        self.log_n_at_test = settings.log_n_at_test

    def forward(self, scores: Tensor, valid: Tensor | None = None) -> Tensor:
        """Weights of keys.

        Args:
            scores: q k, (..., n queries, m keys), not yet divided by sqrt(s).
            valid: (..., 1, m) bool, False for padding; None: all are there.

        Returns:
            (..., n, m), zero at padding.
        """
        if valid is None:
            count = torch.full((1,), scores.shape[-1], device=scores.device, dtype=torch.float32)
        else:
            count = valid.sum(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1)
        if self.kind.startswith("relu2"):
            weights = torch.relu(scores * self.scale).square()
            if valid is not None:
                weights = weights * valid
            if self.kind == "relu2_fixed":
                count = torch.full_like(count, float(self.length))
            return weights / count.to(scores.dtype)
        factor = torch.log(count.clamp_min(16.0)) / self.log_length
        if self.kind == "softmax":
            factor = factor.clamp_min(1.0) if self.log_n_at_test and not self.training else torch.ones_like(factor)
        scores = scores * (self.scale * factor).to(scores.dtype)
        if valid is not None:
            # Finite, also in half precision: with -inf a row without any key would be nan, and its gradient.
            scores = scores.masked_fill(~valid, -6e4)
            return torch.softmax(scores, dim=-1) * valid
        return torch.softmax(scores, dim=-1)

    def extra_repr(self) -> str:
        return str(self.settings)
