"""Products with a gate against their formulas, and what they keep for the backward pass."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops import gated_linear, silu_product

MIXED, OWN, WIDTH = 3, 5, 4


def inputs(
    mixed: int = MIXED, own: int = OWN, *, bias: bool = True, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    """Gate, values that were mixed, others, weight and bias, for sequences (2, 6)."""
    torch.manual_seed(0)
    shapes = [(2, 6, mixed + own), (2, 6, mixed), (2, 6, own), (WIDTH, mixed + own)] + [(WIDTH,)] * bias
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def written_out(gate: Tensor, attended: Tensor, own: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    product = gate * torch.sigmoid(gate) * torch.cat([attended, own], dim=-1)
    return torch.einsum("bne,de->bnd", product, weight) + (0 if bias is None else bias)


def kept_by(*results: Tensor) -> set[int]:
    """Addresses of what the last step of each keeps for the backward pass."""
    return {tensor.data_ptr() for result in results for tensor in result.grad_fn.saved_tensors if tensor is not None}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("mixed", "own"), [(MIXED, OWN), (MIXED, 0)])
def test_a_gated_linear_layer_is_its_formula_with_its_gradients(mixed: int, own: int, bias: bool) -> None:
    tensors = inputs(mixed, own, bias=bias)
    output = gated_linear(*tensors, *([] if bias else [None]))
    expected = written_out(*tensors)
    torch.testing.assert_close(output, expected)
    upstream = torch.randn_like(output)
    found = torch.autograd.grad(output, tensors, upstream, retain_graph=True)
    for ours, theirs in zip(found, torch.autograd.grad(expected, tensors, upstream), strict=True):
        torch.testing.assert_close(ours, theirs)
    assert kept_by(output) <= {tensor.data_ptr() for tensor in tensors}, "nothing but what it was given"


def test_first_and_second_derivatives() -> None:
    tensors = inputs()
    assert torch.autograd.gradcheck(gated_linear, tensors)
    assert torch.autograd.gradgradcheck(gated_linear, tensors)
    gate, value = tensors[0].unsqueeze(-2), torch.randn(2, MIXED + OWN, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(silu_product, (gate, value)), "one gate for two values, which have no batch"
    assert torch.autograd.gradgradcheck(silu_product, (gate, value))
    assert kept_by(silu_product(gate, value)) == {gate.data_ptr(), value.data_ptr()}


def test_gradients_of_each_image_alone() -> None:
    """As torch.func has them, by mapping plain operations; and a derivative forward, which it has as well."""
    gate, attended, own, weight, bias = (tensor.detach() for tensor in inputs())

    def loss(weight: Tensor, *image: Tensor) -> Tensor:
        return silu_product(gated_linear(*image, weight, bias), bias).square().sum()

    found = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0, 0))(weight, gate, attended, own)
    for index, ours in enumerate(found):
        theirs = torch.func.grad(
            lambda weight, i=index: (
                (F.silu(written_out(gate[i : i + 1], attended[i : i + 1], own[i : i + 1], weight, bias)) * bias)
                .square()
                .sum()
            )
        )(weight)
        torch.testing.assert_close(ours, theirs)


def test_forward_derivatives() -> None:
    tensors = tuple(tensor.detach() for tensor in inputs())
    _, found = torch.func.jvp(gated_linear, tensors, tensors)
    _, expected = torch.func.jvp(written_out, tensors, tensors)
    torch.testing.assert_close(found, expected)


def test_under_autocast_all_of_it_is_in_half_precision() -> None:
    tensors = inputs(64, 64, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        output = gated_linear(*tensors)
    assert output.dtype == torch.bfloat16
    assert all(kept.dtype == torch.bfloat16 for kept in output.grad_fn.saved_tensors)
    exact = written_out(*(tensor.double() for tensor in tensors))
    bound = 2**-7 * exact.abs().amax()  # two roundings of 2^-9 before the sum, one after it, and of the inputs
    torch.testing.assert_close(output.double(), exact, atol=bound.item(), rtol=0)
    output.sum().backward()
    assert all(tensor.grad is not None and tensor.grad.dtype == torch.float32 for tensor in tensors)


def test_compiled_whole_it_is_the_same() -> None:
    tensors = inputs(dtype=torch.float32)
    compiled = torch.compile(gated_linear, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), gated_linear(*tensors))


def test_a_single_vector_and_batched_gradients() -> None:
    """Shapes (..., d) without any dimension before; and many gradients in one pass, as jacobian(vectorize=True)."""
    vector = [tensor[0, 0].detach().requires_grad_() for tensor in inputs()[:3]]
    weight, bias = inputs()[3:]
    alone = torch.autograd.grad(gated_linear(*vector, weight, bias).sum(), [*vector, weight])
    batch = [tensor.detach()[None, None].requires_grad_() for tensor in vector]
    together = torch.autograd.grad(gated_linear(*batch, weight, bias).sum(), [*batch, weight])
    for one, many in zip(alone, together, strict=True):
        torch.testing.assert_close(one, many.reshape(one.shape))
    output = gated_linear(*batch, weight, bias)
    many = torch.eye(output.numel(), dtype=output.dtype).unflatten(1, output.shape)
    (rows,) = torch.autograd.grad(output, weight, many, is_grads_batched=True, retain_graph=True)
    (row,) = torch.autograd.grad(output, weight, many[2])
    torch.testing.assert_close(rows[2], row)
