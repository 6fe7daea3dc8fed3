"""Gated attention: every backend against the formula in float64, and the formula against single numbers."""

from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from heatssl.ops import attention

# Largest error over the largest value, of the output and of each gradient.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 3e-3, torch.bfloat16: 3e-2}


def formula(query, key, value, gate, activation, valid):
    """O = U * (A V), padding left out key by key."""
    raw = torch.einsum("...is,...js->...ij", query, key)
    there = torch.ones_like(raw) if valid is None else valid.expand_as(raw).to(raw)
    if activation == "softmax":
        kept = there * torch.exp(raw - raw.amax(dim=-1, keepdim=True))
        weights = kept / kept.sum(dim=-1, keepdim=True).clamp_min(1e-300)
    else:
        weights = there * raw.clamp_min(0) ** 2
    attended = torch.einsum("...ij,...je->...ie", weights, value)
    return attended if gate is None else gate * attended


def inputs(tokens, width, channels, dtype, lead=(2,), device="cpu"):
    """Queries, keys, values and gates as a unit has them: parts of wider tensors. And a mask with one empty row."""
    torch.manual_seed(0)
    query, key = (torch.randn(2, *lead, tokens, width) / width**0.25).to(dtype).unbind(0)
    value, _, gate = torch.randn(*lead, tokens, 2 * channels + 3).to(dtype).split([channels, 3, channels], dim=-1)
    valid = torch.rand(*lead, 1, tokens) > 0.3
    valid[(0,) * len(lead)] = False
    return [x.to(device) for x in (query, key, value, gate)], valid.to(device)


def check_backend(backend, activation, shape, dtype, *, gated=True, masked=True, shared=False, lead=(2,), device="cpu"):
    fields, valid = inputs(*shape, dtype, lead, device)
    if shared:  # one mask for all images
        valid = valid[-1:]
    fields = fields if gated else fields[:3]
    upstream = torch.randn_like(fields[2])
    results = []
    for exact in (True, False):
        leaves = [(x.double() if exact else x).detach().requires_grad_() for x in fields]
        arguments = (*leaves, *([] if gated else [None]), activation, valid if masked else None)
        out = formula(*arguments) if exact else attention(*arguments, backend=backend)
        results.append((out, *torch.autograd.grad(out, leaves, upstream.to(out.dtype))))
    assert results[1][0].dtype == dtype
    for expected, found in zip(*results, strict=True):
        assert found.isfinite().all()
        # A GPU gets sums of hundreds, over which the eager form in float32 is 5e-6 off by itself.
        tolerance = TOLERANCE[dtype] * (1 if device == "cpu" else 5)
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_eager(activation, gated, lead, dtype):
    for masked, shared in ((True, False), (False, False), (True, True)):
        check_backend("eager", activation, (9, 4, 6), dtype, gated=gated, masked=masked, shared=shared, lead=lead)


@pytest.mark.parametrize("shape", [(9, 4, 4), (9, 4, 6), (200, 8, 8)])
@pytest.mark.parametrize("gated", [True, False])
@pytest.mark.parametrize("lead", [(2,), (2, 3)])
def test_torchs_own(shape, gated, lead):
    check_backend("sdpa", "softmax", shape, torch.float32, gated=gated, masked=False, lead=lead)


def test_one_head_of_many_tokens_runs_in_torchs_fused_kernel():
    """Without an axis of heads torch would write all weights down."""
    query, key, value = torch.randn(3, 2, 200, 8).unbind(0)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        attention(query, key, value, None, "softmax")


def test_one_query_by_hand():
    query, key = torch.tensor([[[1.0]]]).expand(1, 2, 1), torch.tensor([[[1.0], [-1.0]]])
    value, gate = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.tensor([[[2.0, 1.0], [1.0, 1.0]]])
    query = query / 2
    soft = attention(query, key, value, gate, "softmax")
    share = torch.sigmoid(torch.tensor(1.0))  # e^0.5 / (e^0.5 + e^-0.5)
    torch.testing.assert_close(soft[0, 0], torch.stack([2 * share, 1 - share]))
    squared = attention(query, key, value, gate, "relu2")
    torch.testing.assert_close(squared[0, 0], torch.tensor([2 * 0.25, 0.0]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"activation": "relu"}, "unknown activation 'relu'"),
        ({"backend": "flash"}, "choose one of auto, eager, sdpa, triton"),
        ({"backend": "sdpa", "activation": "relu2"}, "sdpa is for softmax"),
    ],
)
def test_what_cannot_be_done_is_named(settings, message):
    fields, _ = inputs(4, 4, 4, torch.float32)
    with pytest.raises(ValueError, match=message):
        attention(*fields, **{"activation": "softmax"} | settings)


IN_THE_INTERPRETER = """
import pathlib, sys, torch
sys.path.insert(0, str(pathlib.Path({folder!r})))
from torch.utils.flop_counter import FlopCounterMode
from test_attention import attention, check_backend, inputs
check_backend("triton", {activation!r}, (37, 20, 70), torch.float32)  # more than one tile of each
check_backend("triton", {activation!r}, (5, 4, 6), torch.float32, shared=True, lead=(3,))
if {thorough}:
    check_backend("triton", {activation!r}, (37, 20, 70), torch.float16, masked=False)
    check_backend("triton", {activation!r}, (3, 4, 5), torch.float32, gated=False, lead=(2, 3))
    check_backend("triton", {activation!r}, (33, 16, 16), torch.float32, gated=False, masked=False)
    (query, key, value, gate), valid = inputs(5, 4, 6, torch.float32)
    counts = []
    for backend in ("eager", "triton"):
        with FlopCounterMode(display=False) as counter:
            attention(query, key, value, gate, {activation!r}, backend=backend)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
    whole = torch.compile(attention, backend="aot_eager", fullgraph=True)
    arguments = (query.requires_grad_(), key, value, gate, {activation!r}, valid)
    expected = attention(*arguments, backend="eager")
    found = whole(*arguments, backend="triton")
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), query)[0] for x in (found, expected)))
print("checked")
"""


@pytest.mark.parametrize("thorough", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_triton_in_its_interpreter(activation, thorough, in_the_interpreter):
    """bfloat16 is left out: the interpreter multiplies the bits of its matrices."""
    in_the_interpreter(
        IN_THE_INTERPRETER.format(folder=str(Path(__file__).parent), activation=activation, thorough=thorough)
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("activation", ["softmax", "relu2"])
def test_triton_on_a_gpu(activation, dtype):
    pytest.importorskip("triton")
    for shape in ((49, 128, 768), (200, 64, 64), (1030, 128, 300)):
        check_backend("triton", activation, shape, dtype, device="cuda")
        check_backend("triton", activation, shape, dtype, gated=False, masked=False, device="cuda")
        check_backend("triton", activation, shape, dtype, shared=True, lead=(3,), device="cuda")
