"""Not kept for the backward pass: what is cheap to make again.

    use(*make(*inputs), *others)

keeps ``inputs`` in the place of what ``make`` makes of them, beside what else ``use`` keeps. Checkpointing would run
``use`` a second time as well: the whole of attention, where making its queries and keys takes no matrix product.
"""

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, saved_tensors_hooks

from heatssl.ops.surroundings import autocast_type, must_be_plain

# Numbers of inputs from which what is kept weighs more than the third of a millisecond that it takes to set this up:
# a batch of 8,192 tokens of 128 channels, and on a GPU, which would wait for it, 32,768.
_WORTH = {"cpu": 2**20, "cuda": 2**22}
Make = Callable[..., Sequence[Tensor]]
Use = Callable[..., Tensor]


def recompute(make: Make, use: Use, inputs: Sequence[Tensor], others: Sequence[Tensor]) -> Tensor:
    """``use(*make(*inputs), *others)``, but for what is kept for the backward pass of a large batch.

    Args:
        make: runs again in the backward pass, and has to make the same. Neither it nor ``use`` may read a tensor that
            needs a gradient but for their arguments.
        use: its output is none of its arguments.
        inputs: of ``make``.
        others: of ``use``, behind what was made.
    """
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (*inputs, *others))
    numbers = sum(tensor.numel() for tensor in inputs)
    if must_be_plain() or not needs_gradient or numbers < _WORTH.get(inputs[0].device.type, _WORTH["cuda"]):
        return use(*make(*inputs), *others)
    output: Tensor = _Recompute.apply(make, use, len(inputs), *inputs, *others)
    return output


class _Recompute(torch.autograd.Function):
    """Runs ``use`` in a graph of its own that holds no tensors: this node keeps them, as any other node would."""

    @staticmethod
    def forward(ctx: Any, make: Make, use: Use, number: int, *tensors: Tensor) -> Tensor:
        ctx.autocast = autocast_type(tensors[0])
        ctx.lock = threading.RLock()  # a device's thread may meet it again in the middle of its own
        made = make(*tensors[:number])
        kept = _Kept(made, tensors)
        with torch.enable_grad(), saved_tensors_hooks(kept.pack, kept.unpack):
            anchor = torch.ones((), requires_grad=True)
            starts = [_Start.apply(tensor, anchor) for tensor in (*made, *tensors[number:])]
            output = use(*starts)
        ctx.starts, ctx.end = [_edge(start) for start in starts], _edge(output)
        ctx.make, ctx.use, ctx.number, ctx.kept = make, use, number, kept
        ctx.save_for_backward(*tensors, *kept.tensors)
        kept.tensors, kept.made = [], []
        return output.detach()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        needed, number, kept, saved = ctx.needs_input_grad[3:], ctx.number, ctx.kept, ctx.saved_tensors
        tensors = saved[: len(needed)]
        as_before = _as_in_the_forward_pass(tensors[0].device.type, ctx.autocast)
        if torch.is_grad_enabled():  # somebody differentiates the gradient
            with as_before:
                output = ctx.use(*ctx.make(*tensors[:number]), *tensors[number:])
            return (None, None, None, *_gradients([output], tensors, [upstream], needed, create_graph=True))
        with torch.enable_grad(), as_before:
            inputs = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
            made = ctx.make(*inputs[:number])
        with ctx.lock:  # several threads may go through one graph
            kept.made, kept.tensors = made, list(saved[len(needed) :])
            found = torch.autograd.grad([ctx.end], ctx.starts, [upstream], retain_graph=True, allow_unused=True)
            kept.tensors, kept.made = [], []
        by_inputs = _gradients(made, inputs[:number], found[: len(made)], needed[:number])
        return (None, None, None, *by_inputs, *found[len(made) :])


class _Start(torch.autograd.Function):
    """Where the graph of ``use`` begins. A leaf would be held by it."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG004
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, None]:  # noqa: ARG004
        return None, None


class _Kept:
    """What ``use`` keeps, as numbers in the place of tensors: views of what was made, or tensors of a list.

    What was made is found by its memory. Where that is memory of what was ``given``, whoever moves the node's tensors
    may part what lies in it: it is kept as it is, for nothing.
    """

    def __init__(self, made: Sequence[Tensor], given: Sequence[Tensor]) -> None:
        self.made = made
        self.tensors: list[Tensor] = []
        theirs = {tensor.untyped_storage().data_ptr() for tensor in given}
        addresses = (tensor.untyped_storage().data_ptr() for tensor in made)
        self._places = {address: index for index, address in enumerate(addresses) if address not in theirs}

    def pack(self, tensor: Tensor) -> tuple[int, Any]:
        index = self._places.get(tensor.untyped_storage().data_ptr())
        if index is None:
            self.tensors.append(tensor)
            return len(self.tensors) - 1, None
        offset = tensor.storage_offset() - self.made[index].storage_offset()
        return index, (tensor.size(), tensor.stride(), offset)

    def unpack(self, packed: tuple[int, Any]) -> Tensor:
        index, view = packed
        if view is None:
            return self.tensors[index]
        size, stride, offset = view
        made = self.made[index].detach()
        return made.as_strided(size, stride, made.storage_offset() + offset)


def _as_in_the_forward_pass(device: str, asked: torch.dtype | None) -> AbstractContextManager[Any]:
    """Autocast as it stood around the forward pass."""
    if not torch.amp.is_autocast_available(device):
        return nullcontext()
    return torch.autocast(device, asked, enabled=asked is not None, cache_enabled=False)


def _edge(tensor: Tensor) -> GradientEdge:
    assert tensor.grad_fn is not None
    return GradientEdge(tensor.grad_fn, tensor.output_nr)


def _gradients(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    upstream: Sequence[Tensor | None],
    needed: Sequence[bool],
    *,
    create_graph: bool = False,
) -> list[Tensor | None]:
    """Of those inputs that are needed, None for the others."""
    pairs = zip(outputs, upstream, strict=True)
    ends = [(output, by) for output, by in pairs if by is not None and output.requires_grad]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    if not ends or not wanted:
        return [None] * len(inputs)
    given, by = zip(*ends, strict=True)
    found = iter(torch.autograd.grad(given, wanted, by, create_graph=create_graph, allow_unused=True))
    return [next(found) if need else None for need in needed]
