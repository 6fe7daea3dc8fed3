"""If these fail, models keep more for the backward pass than they say, or compute something else to keep less."""

from collections.abc import Iterator

import pytest
import timm
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import heatssl  # noqa: F401 (registers the names)
from heatssl.ops import recomputation

SIZES = {"img_size": 48, "patch_size": 8, "embed_dim": 48, "depth": 3, "num_classes": 0}
MODELS = {
    "gau": ("gau_tiny_patch16_224", {"key_width": 16}),
    "gau with offsets": ("gau_tiny_patch16_224", {"key_width": 16, "bias": True}),
    "gau, relu2, all mixed": ("gau_tiny_patch16_224", {"key_width": 16, "normaliser": "relu2", "mixed_share": 1.0}),
    "gau with a window": ("gau_tiny_patch16_224", {"key_width": 16, "positions": "rerope", "position_window": 1.5}),
    "flash in one chunk": ("flash_small_patch16_224", {"key_width": 16}),
    "flash in tiles": ("flash_small_patch16_224", {"key_width": 16, "chunk": 3}),
    "flash, chunks not full": ("flash_small_patch16_224", {"key_width": 16, "chunk": 4, "img_size": 72}),
    "roformer_v2": ("roformer_v2_small_patch16_224", {"num_heads": 3}),
}


@pytest.fixture(params=list(MODELS))
def model(request: pytest.FixtureRequest) -> nn.Module:
    return create(request.param)


def create(kind: str) -> nn.Module:
    torch.manual_seed(0)
    name, own = MODELS[kind]
    model = timm.create_model(name, **SIZES | own)
    for name, parameter in model.named_parameters():
        if "query_key" in name:
            nn.init.normal_(parameter)  # at ones, where it begins, nothing is rounded
    return model


def gradients(model: nn.Module, *inputs: torch.Tensor) -> Iterator[torch.Tensor]:
    """The features, and the gradient of every parameter."""
    model.zero_grad()
    features = model.forward_features(*inputs)
    features.square().mean().backward()
    yield features.detach()
    yield from (parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("shown", ["whole", "visible", "padded", "autocast", "checkpointed"])
def test_models_compute_the_same_with_less_kept(model: nn.Module, shown: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    side = model.patch_embed.img_size[0]
    inputs = [torch.randn(2, 3, side, side)]
    if shown in ("visible", "padded"):
        inputs.append(torch.stack([torch.randperm((side // 8) ** 2)[:20] for _ in range(2)]))
    if shown == "padded":
        inputs.append(torch.arange(20) < torch.tensor([[20], [13]]))
    model.set_grad_checkpointing(shown == "checkpointed")
    results = []
    for worth in (2**60, 0):
        monkeypatch.setitem(recomputation._WORTH, "cpu", worth)
        with torch.autocast("cpu", torch.bfloat16, enabled=shown == "autocast"):
            results.append(list(gradients(model, *inputs)))
    assert len(results[0]) == len(results[1]) > 10
    for expected, found in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def kept_of_a_token(block: nn.Module, inputs: tuple) -> float:
    """Numbers for each token, those of parameters left out."""
    kept = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = block(*inputs)
    weights = {parameter.untyped_storage().data_ptr() for parameter in block.parameters()}
    numbers = sum(size for address, size in kept.items() if address not in weights) / 4
    return numbers / output.shape[:-1].numel()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # What enters, gate, values and z, and what attention found.
        ("gau", 48 + 2 * 96 + 16 + 16),
        # The same, softmax's weights of 36 keys and their sum with those far.
        ("flash in one chunk", 48 + 2 * 96 + 16 + 16 + 2 * 36),
        # The same, weights of 9 keys, and the sum of all keys times values, 16 x 16, of 36.
        ("flash in tiles", 48 + 2 * 96 + 16 + 16 + 9 + 16 * 16 // 36),
    ],
)
def test_a_unit_keeps_what_it_was_given_and_little_else(
    kind: str, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(recomputation._WORTH, "cpu", 0)
    model, seen = create(kind), []
    model.blocks[1].register_forward_pre_hook(lambda _block, inputs: seen.append(inputs))
    model(torch.randn(2, 3, 48, 48))
    tokens, where = seen[0]
    inputs = tokens.detach().requires_grad_(), where
    found = kept_of_a_token(model.blocks[1], inputs)
    assert expected <= found < expected + 4, "4: roots and the like"


def test_in_torchs_fused_attention_a_rotation_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a block of RoFormerV2: queries, keys and values as they enter, what was found twice, and the logarithms."""
    monkeypatch.setitem(recomputation._WORTH, "cpu", 0)
    model, seen = create("roformer_v2"), []
    attention = model.blocks[1].attention.layer
    attention.register_forward_pre_hook(lambda _layer, inputs: seen.append(inputs))
    model(torch.randn(2, 3, 48, 48))
    tokens, where = seen[0]
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        found = kept_of_a_token(attention, (tokens.detach().requires_grad_(), where))
    assert 48 + 3 * 48 + 48 <= found < 48 + 3 * 48 + 2 * 48 + 4


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["gau", "gau with a window", "flash in tiles"])
def test_what_makes_queries_and_keys_is_called_where_somebody_listens(
    kind: str, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And gives what the function gives, to the last bit: nothing is rounded that was not."""
    monkeypatch.setitem(recomputation._WORTH, "cpu", 0)
    model, images, seen = create(kind), torch.randn(2, 3, 48, 48), []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        alone = model(images)
    maps = model.blocks[0].layer.query_key
    handle = maps.register_forward_hook(lambda _maps, inputs, _output: seen.append(inputs[0]))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert torch.equal(model(images), alone)
    assert len(seen) == 1
    handle.remove()
    model.blocks[0].layer.query_key = nn.Sequential(maps, nn.Dropout(1.0))
    assert not torch.allclose(model.train()(images), alone)
