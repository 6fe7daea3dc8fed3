"""The gated attention unit: attention and feed-forward layer in one (FLASH, arXiv 2202.10447; GAU-alpha).

    U = silu(X W_u)  (n, e),  V = silu(X W_v)  (n, e),  Z = silu(X W_z)  (n, s)
    O = (U * A V) W_o,  A = normalise(Q(Z) K(Z)^T),  Q and K an affine map of each channel of the same Z

One head. Two units have the parameters of an attention and a feed-forward layer at e = 2 d. Values can be linear,
V = X W_v, as in SwiGLU (arXiv 2002.05202).

Attention may mix a share of the e channels alone. Of the others each token has its own, U * V, a gated linear unit
beside attention, as a ViT's feed-forward layer is: of a block's 5 d inner channels attention mixes d.
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from timm.models import register_notrace_module
from torch import Tensor, nn

from heatssl.backbones.attend import Whereabouts, attend_turned, turned, turning_again
from heatssl.ops import gated_linear, silu_product

ValueActivation = Literal["silu", "none"]


class ScaleOffset(nn.Module):
    """Several affine maps of each channel of silu(z): z (..., s) -> (..., maps, s).

    Args:
        width: s.
        maps: how many.
        offset: whether they have offsets beside their scales.
    """

    def __init__(self, width: int, maps: int, offset: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(maps, width))
        self.offset = nn.Parameter(torch.zeros(maps, width)) if offset else None

    def forward(self, z: Tensor) -> Tensor:
        return affine(z, self.scale, self.offset)

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Vectors are not decayed, however many of them lie in one tensor."""
        return {name for name, _ in self.named_parameters()}


def affine(z: Tensor, scale: Tensor, offset: Tensor | None) -> Tensor:
    """:class:`ScaleOffset` as a function of its parameters (maps, s)."""
    scaled = silu_product(z.unsqueeze(-2), scale)
    return scaled if offset is None else scaled + offset


class GatedUnit(nn.Module):
    """A gated unit, but for what mixes the tokens: (B, n, d) -> (B, n, d).

    Args:
        width: d.
        inner_width: e.
        key_width: s.
        bias: whether linear layers have biases, and queries and keys offsets; GAU-alpha has none.
        value_activation: ``silu`` (FLASH, GAU-alpha), or ``none``: values are linear.
        mixed_width: of the e channels of the values, that attention mixes; None: all (FLASH, GAU-alpha).
        dropout: of the output.

    Attributes:
        maps: queries and keys that are made of each z.

    Raises:
        ValueError: on another ``value_activation``.
    """

    maps: int

    def __init__(
        self,
        width: int,
        inner_width: int,
        key_width: int,
        *,
        bias: bool,
        value_activation: ValueActivation = "silu",
        mixed_width: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if value_activation not in get_args(ValueActivation):
            raise ValueError(f"value_activation must be silu or none, not {value_activation!r}")
        self.values_are_linear = value_activation == "none"
        self.widths = [inner_width, inner_width, key_width]
        mixed = inner_width if mixed_width is None else mixed_width
        self.apart = [mixed, inner_width - mixed]
        self.enter = nn.Linear(width, sum(self.widths), bias=bias)
        self.query_key = ScaleOffset(key_width, self.maps, offset=bias)
        self.leave = nn.Linear(inner_width, width, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, where: Whereabouts) -> Tensor:
        """Tokens (B, n, d), where they are -> (B, n, d)."""
        gate, value, z = self.gate_value_z(x)
        mixed, own = value.split(self.apart, dim=-1)
        return self.dropout(self.gated(gate, self.attend(mixed, z, where), own))

    def gated(self, gate: Tensor, attended: Tensor, own: Tensor) -> Tensor:
        """(U * [A V, V]) W_o: the gate before its SiLU (..., e), values (..., m) and (..., e - m) -> (..., d)."""
        if not torch.jit.is_scripting() and self.leaves_by_product():
            return gated_linear(gate, attended, own, self.leave.weight, self.leave.bias)
        output: Tensor = self.leave(F.silu(gate) * torch.cat([attended, own], dim=-1))
        return output

    @torch.jit.unused
    def leaves_by_product(self) -> bool:
        """Whether the last layer is its product and no more."""
        return is_untouched(self.leave, nn.Linear)

    def gate_value_z(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """U and Z before their SiLU, and V: tokens (B, n, d) -> (B, n, e), (B, n, e), (B, n, s)."""
        return self.apart_as_entered(self.enter(x))

    def apart_as_entered(self, entered: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """:meth:`gate_value_z` of what the first layer gives."""
        gate, value, z = entered.split(self.widths, dim=-1)
        return gate, value if self.values_are_linear else F.silu(value), z

    def attend(self, value: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """A V: values (B, n, m), what queries and keys are made of (B, n, s) -> (B, n, m)."""
        if not torch.jit.is_scripting() and self.makes_queries_by_function():
            return self.attend_again(value, z, where)
        return self.mix(self.turn(self.query_key(z), where), value, where)

    def turn(self, maps: Tensor, where: Whereabouts) -> list[Tensor]:
        """Queries and keys (B, n, maps, s) at their places -> (B, n, s) each."""
        raise NotImplementedError

    def mix(self, maps: list[Tensor], value: Tensor, where: Whereabouts) -> Tensor:
        """A V, of queries and keys at their places (B, n, s) and values (B, n, m) -> (B, n, m)."""
        raise NotImplementedError

    @torch.jit.unused
    def makes_queries_by_function(self) -> bool:
        """Whether queries and keys are what :func:`affine` makes and no more."""
        return is_untouched(self.query_key, ScaleOffset)

    @torch.jit.unused
    def attend_again(self, value: Tensor, z: Tensor, where: Whereabouts) -> Tensor:
        """:meth:`attend` that makes queries and keys again in the backward pass."""

        def make(z: Tensor, scale: Tensor, *offset: Tensor) -> list[Tensor]:
            return self.turn(affine(z, scale, *offset or [None]), where)

        def use(*given: Tensor) -> Tensor:
            return self.mix(list(given[:-1]), given[-1], where)

        return turning_again(make, use, (z, *self.query_key.parameters()), value, where)


class GatedAttentionUnit(GatedUnit):
    """One head of attention over all tokens; arguments are those of :class:`GatedUnit`."""

    maps = 2

    def turn(self, maps: Tensor, where: Whereabouts) -> list[Tensor]:
        """See :meth:`GatedUnit.turn`."""
        query, key = maps.unbind(-2)
        return list(turned(query, key, where))

    def mix(self, maps: list[Tensor], value: Tensor, where: Whereabouts) -> Tensor:
        """See :meth:`GatedUnit.mix`."""
        return attend_turned(maps[0], maps[1], value, where)


def is_untouched(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether nobody replaced a module or listens to it, so that its function can be called in its place."""
    everywhere = nn.modules.module
    listeners = (
        *(module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks),
        *(everywhere._global_forward_pre_hooks, everywhere._global_forward_hooks),
        *(everywhere._global_backward_pre_hooks, everywhere._global_backward_hooks),
    )
    # A forward of its own is how accelerate moves weights to where they are needed.
    return type(module) is kind and "forward" not in vars(module) and not any(listeners)


register_notrace_module(GatedAttentionUnit)  # branches on who runs it
