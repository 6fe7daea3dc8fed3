"""RMS norm that keeps its output: parity with torch's, gradients from what is left, and what is kept."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.ops import rms_norm

EPS = 1e-6


def field(*, weighted: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor | None]:
    torch.manual_seed(0)
    x = (3 * torch.randn(2, 5, 8, dtype=dtype)).requires_grad_()
    return x, torch.randn(8, dtype=dtype).requires_grad_() if weighted else None


@pytest.mark.parametrize("weighted", [True, False])
def test_it_is_torchs(weighted: bool) -> None:
    x, weight = field(weighted=weighted)
    ours, theirs = rms_norm(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS)
    torch.testing.assert_close(ours, theirs)
    asked = [tensor for tensor in (x, weight) if tensor is not None]
    upstream = torch.randn_like(x)
    for found, expected in zip(
        torch.autograd.grad(ours, asked, upstream), torch.autograd.grad(theirs, asked, upstream), strict=True
    ):
        torch.testing.assert_close(found, expected)


def test_first_and_second_derivatives() -> None:
    x, weight = field()
    assert torch.autograd.gradcheck(lambda *inputs: rms_norm(*inputs, EPS), (x, weight))
    assert torch.autograd.gradgradcheck(lambda *inputs: rms_norm(*inputs, EPS), (x, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_nothing_lose_no_gradient(dtype: torch.dtype) -> None:
    """What comes back from the output would be 0 / 0."""
    x, weight = field()
    with torch.no_grad():
        weight[0], weight[1], weight[2] = 0.0, 1e-30, -1e-20
    upstream = torch.randn_like(x)
    exact = torch.autograd.grad(F.rms_norm(x, (8,), weight, EPS), (x, weight), upstream)
    narrow = [tensor.detach().to(dtype).requires_grad_() for tensor in (x, weight)]
    found = torch.autograd.grad(rms_norm(*narrow, EPS), narrow, upstream.to(dtype))
    error = 2**-5 if dtype == torch.bfloat16 else 1e-5
    for ours, theirs in zip(found, exact, strict=True):
        torch.testing.assert_close(ours.double(), theirs, atol=error * theirs.abs().amax().item(), rtol=0)


def test_nothing_is_kept_beside_its_output_which_the_next_layer_keeps_too() -> None:
    x, weight = field(dtype=torch.float32)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        y = rms_norm(x, weight, EPS)
        F.linear(y, torch.randn(4, 8, requires_grad=True))
    large = {tensor.untyped_storage().data_ptr() for tensor in kept if tensor.numel() >= x.numel()}
    assert large == {y.untyped_storage().data_ptr()}


def test_before_a_linear_layer_it_has_the_type_that_autocast_would_cast_it_to() -> None:
    x, weight = field(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        narrow, wide = rms_norm(x, weight, EPS, narrow=True), rms_norm(x, weight, EPS)
    assert (narrow.dtype, wide.dtype) == (torch.bfloat16, torch.float32)
    torch.testing.assert_close(narrow, wide.bfloat16())
    (gradient,) = torch.autograd.grad(narrow.float().square().sum(), x)
    assert gradient.dtype == torch.float32


def test_float16_goes_through_torchs_own() -> None:
    x, weight = (tensor.detach().half().requires_grad_() for tensor in field())
    torch.testing.assert_close(rms_norm(x, weight, EPS), F.rms_norm(x, (8,), weight, EPS), rtol=0, atol=0)


def test_compiled_whole_it_is_the_same() -> None:
    x, weight = field(dtype=torch.float32)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, weight, EPS), rms_norm(x, weight, EPS))


def test_a_single_vector() -> None:
    x, weight = (torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-6), (x, weight))
