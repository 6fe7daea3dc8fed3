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
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from heatssl.errors import check_choice

Kind = Literal["relu2", "relu2_fixed", "softmax", "softmax_plus"]
_FEWEST = 16  # keys of softmax_plus, GAU-alpha


@dataclass(frozen=True)
class NormaliserSettings:
    """How scores become weights.

    Attributes:
        kind: see the module's text.
        length: N, keys at training.
        log_n_at_test: softmax: multiply scores by max(1, log n / log N) in evaluation mode. It changes nothing where a
            model sees N keys: after pretraining on parts of images, N has to be what a query saw then.

    Raises:
        ValueError: on an unknown kind, a length below 1, or a factor at test for another kind than softmax or for a
            length of 1, which has none.
    """

    kind: Kind = "softmax_plus"
    length: int = 196
    log_n_at_test: bool = False

    def __post_init__(self) -> None:
        check_choice("normaliser", self.kind, get_args(Kind))
        if self.length < 1:
            raise ValueError(f"length must be at least 1, not {self.length}")
        if self.log_n_at_test and self.kind != "softmax":
            raise ValueError(f"log_n_at_test is for normaliser=softmax, not {self.kind}")
        if self.log_n_at_test and self.length < 2:
            raise ValueError(f"log_n_at_test divides by log N: length must be at least 2, not {self.length}")


class Weighting(NamedTuple):
    """What attention needs to know to weight its keys, see :func:`heatssl.ops.attention`.

    Attributes:
        activation: ``softmax`` or ``relu2``.
        factor: of the scores q k, with 1 / sqrt(s), and with 1 / sqrt(n) for what relu2 squares.
    """

    activation: str
    factor: Tensor


class Normaliser(nn.Module):
    """Numbers of keys -> their :class:`Weighting`, computed once and used by every layer; has no parameters.

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
        self.fewest = _FEWEST if self.kind == "softmax_plus" else 1
        self.log_length = math.log(max(settings.length, self.fewest))
        self.log_n_at_test = settings.log_n_at_test

    def forward(self, count: Tensor) -> Weighting:
        """For n keys, float32 of any shape, which the factor has as well."""
        ones = torch.ones_like(count)
        if self.kind.startswith("relu2"):
            number = self.length * ones if self.kind == "relu2_fixed" else count
            return Weighting("relu2", self.scale * number.rsqrt())
        is_plain = self.kind == "softmax"
        if is_plain and (self.training or not self.log_n_at_test):
            return Weighting("softmax", self.scale * ones)
        factor = torch.log(count.clamp_min(self.fewest)) / self.log_length
        if is_plain:
            factor = factor.clamp_min(1.0)
        return Weighting("softmax", self.scale * factor)

    def extra_repr(self) -> str:
        return str(self.settings)


def number_of_keys(places: Tensor, keys: Tensor | None) -> Tensor:
    """How many keys the queries of a sequence have, at least 1.

    Args:
        places: of tokens, (..., n, 2).
        keys: (..., 1 or n, n) bool, which of them every query or each one has; None: all.

    Returns:
        (..., 1 or n, 1) float32, to go with scores (..., n, n); without ``keys`` one number, (1, 1, 1).
    """
    if keys is None:
        return torch.full((1, 1, 1), places.shape[-2], device=places.device, dtype=torch.float32)
    return keys.sum(dim=-1, keepdim=True, dtype=torch.float32).clamp_min(1)
