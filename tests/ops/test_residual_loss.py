"""The fused residual loss against closed forms and against the plain formulation, whatever the backend."""

import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch

from heatssl.heat import Laplace, laplacian_stencil
from heatssl.ops import depthwise_stencil, residual_loss, residual_loss_and_map
from heatssl.ops import residual_loss as dispatch_function

LAYOUTS = [torch.contiguous_format, torch.channels_last]
# An asymmetric stencil with a zero: a flipped or transposed adjoint would pass with a Laplacian.
SKEWED = torch.tensor([[0.5, -1.0, 0.0], [2.0, -3.5, 0.25], [1.0, 0.75, -0.5]], dtype=torch.float64)

CROSS = torch.tensor([[0.0, -1.0, 0.0], [2.0, -3.0, 0.25], [0.0, 0.75, 0.0]], dtype=torch.float64)  # no corners
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


def plain(z: torch.Tensor, stencil: torch.Tensor, boundary: str, upstream: float):
    """Loss, map and gradient by autograd, in float64."""
    z = z.detach().double().requires_grad_()
    squared = depthwise_stencil(z, stencil, boundary).square()
    (gradient,) = torch.autograd.grad(squared.mean() * upstream, z)
    return squared.mean().detach(), squared.mean(dim=1).detach(), gradient


@pytest.mark.parametrize("backend", ["eager", pytest.param("compiled", marks=needs_compiler)])
def test_closed_form(backend):
    """z = x^2 + y^2 has the Laplacian 4 everywhere: loss 16, and no gradient where the stencil's adjoint of 4 is 0."""
    y, x = torch.meshgrid(torch.arange(7.0), torch.arange(9.0), indexing="ij")
    z = (x**2 + y**2).expand(2, 3, 7, 9).clone().requires_grad_()
    loss = residual_loss(z, laplacian_stencil("5pt"), backend=backend)
    loss.backward()
    assert loss.item() == pytest.approx(16)
    assert z.grad[:, :, 2:-2, 2:-2].abs().max() < 1e-6
    # a corner's neighbour along the edge is read by one response only: 2 / (5 * 7) * 4, for each of 2 * 3 images
    assert z.grad[:, :, 0, 1] == pytest.approx(torch.full((2, 3), 2 / (6 * 35) * 4))


@pytest.mark.parametrize("boundary", ["interior", "replicate", "reflect"])
def test_law_offers_its_mean_residual(boundary):
    z = torch.randn(2, 3, 6, 5)
    law = Laplace("9pt", boundary, spacing=0.5)
    assert law.loss(z).item() == pytest.approx(law.residual(z).mean().item(), rel=1e-5)


def check_backend(backend, z, stencil, boundary, tolerance):
    upstream = 0.7
    loss, residual, gradient = plain(z, stencil, boundary, upstream)
    leaf = z.detach().requires_grad_()  # no clone, which would lie densely
    fused = residual_loss(leaf, stencil, boundary, backend)
    (fused * upstream).backward()
    assert fused.dtype == (torch.float64 if z.dtype == torch.float64 else torch.float32)
    assert fused.item() == pytest.approx(loss.item(), rel=1e-12 if z.dtype == torch.float64 else 1e-5)
    assert leaf.grad.dtype == z.dtype
    assert leaf.grad.stride() == torch.empty_like(z).stride()  # of z itself where z lies densely
    assert (leaf.grad - gradient).abs().max() <= tolerance * gradient.abs().max()
    value, seen = residual_loss_and_map(z, stencil, boundary, backend)
    assert value.item() == pytest.approx(loss.item(), rel=1e-5)
    assert seen.shape == residual.shape
    assert (seen - residual).abs().max() <= 1e-5 * residual.max()


TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_eager(dtype, layout):
    """float16 and bfloat16 accumulate in float32: the loss itself is as exact as in float32."""
    z = torch.randn(2, 5, 7, 6).to(dtype).to(memory_format=layout)
    for boundary in ("interior", "replicate", "reflect"):
        check_backend("eager", z, SKEWED, boundary, TOLERANCE[dtype])


SMALLEST = {"interior": 3, "replicate": 1, "reflect": 2}
SIZES = [
    *[(2, 3, 3, 3), (2, 3, 7, 5), (1, 2, 5, 17), (2, 1, 1, 9), (1, 3, 9, 1), (2, 2, 1, 1), (1, 3, 2, 2)],
    (70, 65, 4, 3),  # more planes than shares of the work, and a last line of fewer planes than the others
    (1, 2, 66, 64),  # a plane that is a line of its own, or more than one
    (1, 3, 9, 300),  # rows that are a line of their own
    (2, 70, 13, 9),  # long rows in channels_last: at a time four, and what remains
    (1, 1, 35, 520),  # long rows in any layout, in bands
    (1, 64, 40, 9),  # and in bands in channels_last alone
]


def strictly(backend, z, stencil, boundary, tolerance):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a fallback to eager would hide what is tested
        check_backend(backend, z, stencil, boundary, tolerance)


@needs_compiler
@pytest.mark.parametrize("boundary", SMALLEST)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_compiled(boundary, layout, dtype):
    """With corners and without; whether rows are swept in one line or some at a time, and wherever a tile ends."""
    for shape in SIZES:
        if min(shape[2:]) >= SMALLEST[boundary]:
            z = torch.randn(shape).to(dtype).to(memory_format=layout)
            for stencil in (SKEWED, CROSS):
                strictly("compiled", z, stencil, boundary, TOLERANCE[dtype])


@needs_compiler
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("position", range(9))
def test_compiled_leaves_out_no_weight(position, layout):
    """Corners that are all zero are skipped; a stencil may have one alone."""
    stencil = torch.zeros(9, dtype=torch.float64)
    stencil[position] = 2
    for shape in [(2, 3, 5, 4), (1, 130, 9, 5)]:
        strictly("compiled", torch.randn(shape).to(memory_format=layout), stencil.view(3, 3), "interior", 2e-6)


@needs_compiler
@pytest.mark.parametrize("boundary", SMALLEST)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_gradcheck(boundary, layout):
    z = torch.randn(1, 2, 4, 5, dtype=torch.float64).to(memory_format=layout).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: residual_loss(z, SKEWED, boundary, "compiled"), z)


@needs_compiler
@pytest.mark.parametrize("boundary", ["interior", "reflect"])
def test_compiled_gives_the_same_bits_for_any_number_of_threads(boundary):
    """A run must not change with the machine's load or its cores; contiguous, channels_last, and in bands."""
    before = torch.get_num_threads()
    fields = [torch.randn(40, 33, 7, 6), torch.randn(5, 64, 20, 9).to(memory_format=torch.channels_last)]
    try:
        for z in fields:
            results = []
            for threads in (1, 2, 1, 2, 3):
                torch.set_num_threads(threads)
                leaf = z.clone().requires_grad_()
                loss = residual_loss(leaf, SKEWED, boundary, "compiled")
                loss.backward()
                results.append((loss.detach(), leaf.grad))
            assert all(torch.equal(loss, results[0][0]) for loss, _ in results)
            assert all(torch.equal(gradient, results[0][1]) for _, gradient in results)
    finally:
        torch.set_num_threads(before)


@needs_compiler
def test_compiled_float16_scales_its_gradient_before_it_rounds():
    """A loss scale is there because gradients of this size are not numbers of float16."""
    z = (0.001 * torch.randn(2, 16, 40, 40)).half().requires_grad_()
    (residual_loss(z, SKEWED, backend="compiled") * 2**14).backward()
    _, _, gradient = plain(z, SKEWED, "interior", 2**14)
    assert gradient.abs().max() / 2**14 < 1e-5
    assert (z.grad - gradient).abs().max() <= 2e-3 * gradient.abs().max()


@needs_compiler
@pytest.mark.parametrize("boundary", SMALLEST)
@pytest.mark.parametrize("size", [(7, 5, 4), (3, 30, 9)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_compiled_keeps_what_is_not_a_number_in_its_channel(layout, size, boundary):
    """Else one diverging channel would blind a log that tells which one it was."""
    z = torch.randn(2, *size).to(memory_format=layout)
    z[0, 1, -1, -1] = z[0, 1, 0, 0] = torch.nan
    leaf = z.requires_grad_()
    loss = residual_loss(leaf, torch.ones(3, 3), boundary, "compiled")
    loss.backward()
    assert loss.isnan()
    assert leaf.grad[0, 1].isnan().any()
    assert leaf.grad[0, 0].isfinite().all()
    assert leaf.grad[0, 2:].isfinite().all()
    assert leaf.grad[1].isfinite().all()


@needs_compiler
def test_compiled_backward_twice_without_and_with_grad_mode():
    z = torch.randn(2, 16, 4, 7, requires_grad=True)
    _, _, gradient = plain(z, SKEWED, "interior", 3.0)
    loss = residual_loss(z, SKEWED, backend="compiled")
    for _ in range(2):  # the first backward gives its gradient away; the second must not see it scaled
        (got,) = torch.autograd.grad(loss, z, torch.tensor(3.0), retain_graph=True)
        assert torch.allclose(got, gradient.float(), atol=1e-6)
    with torch.no_grad():
        assert not residual_loss(z, SKEWED, backend="compiled").requires_grad
    assert not residual_loss(z.detach(), SKEWED, backend="compiled").requires_grad


def check_gradient_penalty(backend: str, boundary: str) -> None:
    """A penalty on the gradient beside other terms must not be left out without a word."""
    z = torch.randn(2, 4, 5, 7, requires_grad=True)

    def penalty(loss: torch.Tensor) -> torch.Tensor:
        (gradient,) = torch.autograd.grad(3 * loss + z.square().sum(), z, create_graph=True)
        return gradient.square().sum()

    (wanted,) = torch.autograd.grad(penalty(residual_loss(z, SKEWED, boundary, "eager")), z)
    for fused in (residual_loss, lambda *arguments: residual_loss_and_map(*arguments)[0]):
        (found,) = torch.autograd.grad(penalty(fused(z, SKEWED, boundary, backend)), z)
        torch.testing.assert_close(found, wanted)


@needs_compiler
@pytest.mark.parametrize("boundary", ["interior", "reflect"])
def test_a_fused_gradient_can_be_differentiated(boundary):
    check_gradient_penalty("compiled", boundary)


def test_eager_gradcheck_twice():
    z = torch.randn(1, 2, 4, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: residual_loss(z, SKEWED, "reflect"), z)
    assert torch.autograd.gradgradcheck(lambda z: residual_loss(z, SKEWED), z)


def test_without_a_compiler_one_warning_and_the_same_numbers(monkeypatch):
    from heatssl.ops import compiled

    module = sys.modules[dispatch_function.__module__]

    def broken():
        raise RuntimeError("no g++")

    monkeypatch.setattr(compiled, "library", broken)
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    module._load_compiled.cache_clear()
    try:
        z = torch.randn(2, 3, 6, 5, requires_grad=True)
        with pytest.warns(UserWarning, match=r"no g\+\+.*install a C\+\+ compiler"):
            loss = residual_loss(z, SKEWED, backend="compiled")
        (gradient,) = torch.autograd.grad(loss, z, torch.tensor(2.0))
        expected, _, expected_gradient = plain(z, SKEWED, "interior", 2.0)
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(gradient, expected_gradient.float(), atol=1e-5)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            residual_loss(z, SKEWED, backend="compiled").backward()
    finally:
        module._load_compiled.cache_clear()


def test_small_and_strided_fields_need_no_compiler(monkeypatch):
    """Neither a copy of what is not dense, nor the memory of what is negated only when it is read."""
    module = sys.modules[dispatch_function.__module__]

    def forbidden():
        raise AssertionError("compiled")

    monkeypatch.setattr(module, "_load_compiled", forbidden)
    residual_loss(torch.randn(2, 3, 6, 5), SKEWED)
    large = torch.randn(8, 64, 64, 64)
    for z in (large[:, :, :, ::2], torch._neg_view(large), large.expand(2, 8, 64, 64, 64)[:, 0, :, :, :]):
        assert residual_loss(z, SKEWED).item() == pytest.approx(plain(z, SKEWED, "interior", 1)[0].item())


@needs_compiler
def test_large_fields_are_fused(monkeypatch):
    from heatssl.ops import compiled

    swept = []
    monkeypatch.setattr(compiled, "loss_and_gradient", lambda z, *rest: swept.append(z) or (z.sum(), z))
    residual_loss(torch.randn(8, 64, 32, 32, requires_grad=True), SKEWED)
    assert len(swept) == 1


def test_wrong_input_is_named():
    z = torch.randn(1, 2, 4, 4)
    with pytest.raises(ValueError, match="interior, replicate, reflect"):
        residual_loss(z, SKEWED, "periodic")
    with pytest.raises(ValueError, match="auto, eager, compiled, triton"):
        residual_loss(z, SKEWED, backend="cuda")
    with pytest.raises(ValueError, match=r"\(3, 3\), not \(5, 5\)"):
        residual_loss(z, torch.ones(5, 5))
    with pytest.raises(ValueError, match="does not train its stencil"):
        residual_loss(z, torch.ones(3, 3, requires_grad=True))
    with pytest.raises(ValueError, match="floating-point"):
        residual_loss(z.int(), SKEWED)
    with pytest.raises(ValueError, match="at least 3x3"):
        residual_loss(torch.randn(1, 1, 2, 4), SKEWED)


def test_a_larger_compiled_graph_takes_the_loss_whole():
    z = torch.randn(2, 3, 6, 6)
    law = torch.compile(Laplace().loss, fullgraph=True, backend="eager")
    torch.testing.assert_close(law(z), Laplace().loss(z))


def test_torch_func_differentiates_large_fields_too():
    z = torch.randn(2, 128, 33, 33, requires_grad=True)
    assert z.numel() >= sys.modules[dispatch_function.__module__].SMALL
    (expected,) = torch.autograd.grad(residual_loss(z, SKEWED), z)
    torch.testing.assert_close(torch.func.grad(lambda z: residual_loss(z, SKEWED))(z.detach()), expected)


IN_THE_INTERPRETER = """
import pathlib, sys, torch
sys.path.insert(0, str(pathlib.Path({folder!r})))
from test_residual_loss import LAYOUTS, SKEWED, TOLERANCE, check_backend, check_gradient_penalty
contiguous, channels_last = LAYOUTS
cases = [
    ("interior", contiguous, (2, 3, 5, 6)),  # one line of quads, in which fields end
    ("interior", contiguous, (4, 1, 5, 7)),  # and of an odd number of them
    ("interior", contiguous, (1, 1, 17, 15)),  # no line: several lanes, the rows in parts
    ("interior", channels_last, (1, 130, 3, 3)),  # several programs of channels
    ("replicate", contiguous, (1, 1, 3, 6)),  # columns in pairs, and the last lane with one pair
    ("reflect", contiguous, (1, 2, 5, 4)),
    ("reflect", contiguous, (1, 1, 4, 3)),  # a last column on its own
    ("replicate", channels_last, (1, 2, 2, 3)),
    ("replicate", contiguous, (1, 1, 1, 1)),
    ("interior", contiguous, (1, 5, 41, 40)),  # a line of two programs
]
for dtype, chosen in {runs}:
    dtype = getattr(torch, dtype)
    for boundary, layout, shape in cases[slice(*chosen)]:
        z = torch.randn(shape).to(dtype).to(memory_format=layout)
        check_backend("triton", z, SKEWED, boundary, TOLERANCE[dtype])
at_odd_places = torch.randn(1, 2, 5, 6).to(dtype)[..., 1:5]
check_backend("triton", at_odd_places, SKEWED, "interior", TOLERANCE[dtype])
negated = torch.complex(*torch.randn(2, 1, 2, 5, 6)).conj().imag  # a sign that is kept apart from the numbers
assert negated.is_neg()
check_backend("triton", negated, SKEWED, "interior", TOLERANCE[torch.float32])
check_gradient_penalty("triton", "interior")
print("checked")
"""
# Starting the interpreter takes longer than a case: those that always run share one.
ALWAYS = [("float16", (0, 1)), ("bfloat16", (0, 1)), ("float32", (0, 5)), ("float32", (7, 8))]


@pytest.mark.parametrize(
    "runs",
    [
        pytest.param(ALWAYS, id="always"),
        *(
            pytest.param([(name, (0, None))], id=name, marks=pytest.mark.slow)
            for name in ("float32", "bfloat16", "float16", "float64")
        ),
    ],
)
def test_triton_in_its_interpreter(runs, in_the_interpreter):
    in_the_interpreter(IN_THE_INTERPRETER.format(folder=str(Path(__file__).parent), runs=runs))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_triton_on_a_gpu(dtype, layout):
    pytest.importorskip("triton")
    z = torch.randn(2, 70, 17, 16, device="cuda").to(dtype).to(memory_format=layout)
    at_odd_places = torch.randn(2, 3, 17, 18, device="cuda").to(dtype)[..., 1:17]  # no two columns in one word
    for boundary in ("interior", "replicate", "reflect"):
        check_backend("triton", z, SKEWED.cuda(), boundary, TOLERANCE[dtype])
        check_backend("triton", at_odd_places, SKEWED.cuda(), boundary, TOLERANCE[dtype])
