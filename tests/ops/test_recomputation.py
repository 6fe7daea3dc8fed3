"""If these fail, what is made again in the backward pass is not what was made, or is kept all the same."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from heatssl.ops import attention, recomputation, recompute

Loss = Callable[..., Tensor]


@pytest.fixture(autouse=True)
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """However small."""
    monkeypatch.setitem(recomputation._WORTH, "cpu", 0)


def queries_and_keys(z: Tensor, scale: Tensor) -> list[Tensor]:
    """Of z (2, 9, 4) and scales (2, 4)."""
    return [torch.sin(z * scale[index]) for index in range(2)]


def written_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return torch.softmax(query @ key.mT, dim=-1) @ value


def fused(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    heads = [x.unsqueeze(0) for x in (query, key, value)]
    return F.scaled_dot_product_attention(*heads).squeeze(0)


def mixed(z: Tensor, scale: Tensor, value: Tensor, use: Loss = written_out) -> Tensor:
    return recompute(queries_and_keys, use, (z, scale), (value,))


def plainly(z: Tensor, scale: Tensor, value: Tensor, use: Loss = written_out) -> Tensor:
    return use(*queries_and_keys(z, scale), value)


def inputs(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in ((2, 9, 4), (2, 4), (2, 9, 4))]


def check_equal(ours: Loss, theirs: Loss, tensors: list[Tensor]) -> None:
    """The same output and gradients, to the last bit: they are the same operations."""
    found, expected = ours(*tensors), theirs(*tensors)
    assert torch.equal(found, expected)
    upstream, gradients = torch.randn_like(expected), []
    for output in (found, expected):
        output.backward(upstream)
        gradients.append([tensor.grad for tensor in tensors if tensor.requires_grad])
        for tensor in tensors:
            tensor.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def kept_by(compute: Loss, tensors: list[Tensor]) -> int:
    """Numbers that a forward pass keeps beside its arguments, each storage once."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes() // tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = compute(*tensors)  # held, so that no address is used twice
    given = {tensor.data_ptr() for tensor in tensors}
    del output
    return sum(size for address, size in kept.items() if address not in given)


@pytest.mark.parametrize("use", [written_out, fused])
def test_it_is_what_it_would_be_without_and_keeps_less(use: Loss) -> None:
    tensors = inputs(torch.float32)
    check_equal(partial(mixed, use=use), partial(plainly, use=use), tensors)
    weights = 2 * 9 * 9 if use is written_out else 0
    output_and_logs = 0 if use is written_out else 2 * 9 * 4 + 2 * 9
    assert kept_by(partial(mixed, use=use), tensors) == weights + output_and_logs
    assert kept_by(partial(plainly, use=use), tensors) >= weights + output_and_logs + 2 * 2 * 9 * 4


@pytest.mark.parametrize("missing", [(0,), (1,), (2,), (0, 1), (1, 2), (0, 1, 2)])
def test_some_need_no_gradient(missing: tuple[int, ...]) -> None:
    tensors = [x.detach() if index in missing else x for index, x in enumerate(inputs())]
    if len(missing) == 3:
        assert not mixed(*tensors).requires_grad
    else:
        check_equal(mixed, plainly, tensors)


def test_first_and_second_derivatives() -> None:
    assert torch.autograd.gradcheck(mixed, inputs())
    assert torch.autograd.gradgradcheck(mixed, inputs())


def test_a_graph_that_is_gone_through_twice() -> None:
    tensors = inputs()
    output = mixed(*tensors).sum()
    first = torch.autograd.grad(output, tensors, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(output, tensors), strict=True))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_inside_checkpointing_nothing_is_kept(use_reentrant: bool) -> None:
    compute = partial(checkpoint, mixed, use_reentrant=use_reentrant)
    check_equal(compute, plainly, inputs())
    assert kept_by(compute, inputs()) == 0


def test_what_is_kept_can_be_moved_by_hooks() -> None:
    def offloaded(*tensors: Tensor) -> Tensor:
        with torch.autograd.graph.save_on_cpu():
            return mixed(*tensors)

    check_equal(offloaded, plainly, inputs())


def test_what_is_made_may_be_a_part_of_what_was_given() -> None:
    """Queries, keys and values of one tensor, where nothing turns them: moved one by one they lie apart."""

    def parts(together: Tensor) -> tuple[Tensor, ...]:
        return together.unflatten(-1, (3, 4)).unbind(-2)

    def offloaded(together: Tensor) -> Tensor:
        query, key, value = parts(together)
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.clone(), lambda tensor: tensor):
            return recompute(lambda *given: given, written_out, (query, key), (value,))

    together = torch.randn(2, 9, 12, dtype=torch.float64, requires_grad=True)
    check_equal(offloaded, lambda together: written_out(*parts(together)), [together])


def test_one_inside_another() -> None:
    def use(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return recompute(lambda scores: [scores.square()], torch.matmul, (query @ key.mT,), (value,))

    def use_plainly(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return (query @ key.mT).square() @ value

    check_equal(partial(mixed, use=use), partial(plainly, use=use_plainly), inputs())
    assert kept_by(partial(mixed, use=use), inputs()) == 2 * 9 * 9, "scores, and no squares"


def test_relu2_keeps_one_number_for_each_pair() -> None:
    query, key, value = (torch.randn(2, 40, 8, requires_grad=True) for _ in range(3))
    assert kept_by(lambda *x: attention(*x, None, "relu2"), [query, key, value]) == 2 * 40 * 40


def test_what_is_small_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    tensors = inputs()
    monkeypatch.setitem(recomputation._WORTH, "cpu", 2 * 9 * 4 + 2 * 4 + 1)
    assert kept_by(mixed, tensors) == kept_by(plainly, tensors)


def test_transforms_and_graphs_get_plain_operations() -> None:
    z, scale, value = (tensor.detach() for tensor in inputs(torch.float32))

    def loss(compute: Loss, z: Tensor, value: Tensor) -> Tensor:
        return compute(z, scale, value).square().sum()

    found = torch.func.vmap(torch.func.grad(partial(loss, mixed)))(z, value)
    expected = torch.autograd.grad(loss(plainly, leaf := z.clone().requires_grad_(), value), leaf)[0]
    torch.testing.assert_close(found, expected)
    compiled = torch.compile(mixed, fullgraph=True, backend="aot_eager")
    check_equal(compiled, plainly, inputs(torch.float32))


def test_second_derivatives_behind_autocast() -> None:
    """What is run again outside of it must be what ran inside: queries of bfloat16 beside values of float32."""
    tensors = inputs(torch.float32)

    def narrow(z: Tensor, scale: Tensor) -> list[Tensor]:
        return [each.bfloat16() for each in queries_and_keys(z, scale)]

    def again(z: Tensor, scale: Tensor, value: Tensor) -> Tensor:
        return recompute(narrow, written_out, (z, scale), (value,))

    def penalty(compute: Loss) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            output = compute(*tensors)
        gradients = torch.autograd.grad(output.float().square().sum(), tensors, create_graph=True)
        return sum(gradient.square().sum() for gradient in gradients)

    found, expected = (torch.autograd.grad(penalty(compute), tensors) for compute in (again, plainly))
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=0.02)


def test_threads_that_go_through_one_graph() -> None:
    tensors = inputs()
    output = mixed(*tensors).sum()
    expected = torch.autograd.grad(output, tensors, retain_graph=True)

    def go_through(_: int) -> bool:
        found = [torch.autograd.grad(output, tensors, retain_graph=True) for _ in range(20)]
        return all(torch.equal(a, b) for each in found for a, b in zip(each, expected, strict=True))

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(go_through, range(6)))


def test_forward_mode_gets_plain_operations() -> None:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(tensor, torch.ones_like(tensor)) for tensor in inputs()]
        found, expected = (forward_ad.unpack_dual(compute(*duals)).tangent for compute in (mixed, plainly))
    torch.testing.assert_close(found, expected)


def test_what_is_made_again_is_made_in_the_type_that_autocast_asked_for() -> None:
    """The backward pass runs outside of it."""
    weight, *tensors = (tensor.detach().requires_grad_() for tensor in (torch.randn(4, 4), *inputs(torch.float32)))
    z, _, value = tensors

    def make(z: Tensor, weight: Tensor) -> list[Tensor]:
        return [z @ weight, z @ weight.mT]

    def gradients(compute: Loss) -> tuple[Tensor, ...]:
        with torch.autocast("cpu", torch.bfloat16):
            output = compute(z, weight, value)
        return torch.autograd.grad(output.float().sum(), (z, weight, value))

    found = gradients(lambda z, weight, value: recompute(make, written_out, (z, weight), (value,)))
    expected = gradients(lambda z, weight, value: written_out(*make(z, weight), value))
    for ours, theirs in zip(found, expected, strict=True):  # autocast casts z once or twice: a digit of bfloat16
        torch.testing.assert_close(ours, theirs, rtol=2**-7, atol=2**-7 * theirs.abs().max().item())
