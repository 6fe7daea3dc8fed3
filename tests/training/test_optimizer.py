"""Which parameters an optimiser moves, and how."""

import copy

import pytest
import timm.optim
import torch
from torch import nn

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.config import OptimizerConfig
from heatssl.errors import UserError
from heatssl.training import muon
from heatssl.training.muon import StackedMuon
from heatssl.training.optimizer import create_optimizer

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}


def stepped(name: str) -> tuple[nn.Module, dict[str, torch.Tensor]]:
    """An objective and the change of each parameter by the first step."""
    torch.manual_seed(0)
    objective = objectives.create({"name": "heat_jepa"}, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    optimizer, _ = create_optimizer(objective, OptimizerConfig(name=name, learning_rate=0.01, weight_decay=0.0))
    before = {key: value.detach().clone() for key, value in objective.named_parameters()}
    objective(torch.randn(8, 3, 32, 32)).loss.backward()
    optimizer.step()
    return objective, {key: (value - before[key]).detach() for key, value in objective.named_parameters()}


def test_muon_moves_linear_layers_alike_in_all_directions_and_leaves_the_rest_to_adamw() -> None:
    _, by_adamw = stepped("adamw")
    objective, by_muon = stepped("muon")
    linear = {f"{name}.weight" for name, module in objective.named_modules() if isinstance(module, nn.Linear)}
    assert "backbone.blocks.0.mlp.fc1.weight" in linear
    assert "to_field.weight" in linear
    for name, change in by_muon.items():
        if name not in linear:
            # Not to the digit: timm adds other small numbers under the root. The step of Muon has a cosine of 0.8.
            assert torch.cosine_similarity(change.flatten(), by_adamw[name].flatten(), dim=0) > 0.98, name
            continue
        values = torch.linalg.svdvals(change)
        assert values[0] < 3 * values[len(values) // 2], f"{name}: Newton and Schulz's steps make singular values alike"
        # As long, per weight, as a step of AdamW would be: timm's scale, 0.2 of the learning rate.
        assert change.square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.4), name


def test_matrices_in_stacks_move_as_timm_moves_them_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(muon, "type_of_products", lambda _: torch.bfloat16)  # timm's, on every machine
    torch.manual_seed(0)
    theirs = nn.Sequential(*(nn.Linear(m, n) for m, n in [(6, 9), (9, 6), (6, 9), (9, 9)]))
    models, optimizers = (theirs, copy.deepcopy(theirs)), []
    for model, kind in zip(models, (timm.optim.Muon, StackedMuon), strict=True):
        matrices = [p for p in model.parameters() if p.ndim == 2]
        groups = [{"params": matrices}, {"params": [layer.bias for layer in model], "use_fallback": True}]
        optimizers.append(kind(groups, lr=0.1, weight_decay=0.1, nesterov=True))
    for step in range(3):
        x = torch.randn(16, 6)
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            (model(x) - 1).square().mean().backward()
            if step == 1:
                model[0].weight.grad = None  # a matrix that the loss of this step does not see
            optimizer.step()
            assert model[2].weight.grad is not None, "gradients are still there after the step"
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-3)  # bfloat16, in another order of sums
    one_by_one, stacked = (optimizer.state_dict() for optimizer in optimizers)
    assert {key: set(state) for key, state in stacked["state"].items()} == {
        key: set(state) for key, state in one_by_one["state"].items()
    }
    optimizers[0].load_state_dict(stacked)


@pytest.mark.parametrize(
    ("device", "capability", "expected"),
    [
        ("cpu", "AVX2", torch.float32),
        ("cpu", "DEFAULT", torch.float32),
        ("cpu", "AVX512", torch.bfloat16),
        ("cuda", "AVX2", torch.bfloat16),
    ],
)
def test_a_cpu_without_instructions_for_bfloat16_does_without(
    monkeypatch: pytest.MonkeyPatch, device: str, capability: str, expected: torch.dtype
) -> None:
    """It is 15 to 50 times as slow there, and was three quarters of a run's time."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert muon.type_of_products(torch.device(device)) is expected


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_vectors_and_tables_are_not_decayed(name: str) -> None:
    torch.manual_seed(0)
    objective = objectives.create({"name": "mae"}, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    optimizer, decay = create_optimizer(objective, OptimizerConfig(name=name, weight_decay=0.1))
    free = {id(p) for group in optimizer.param_groups if not group["weight_decay"] for p in group["params"]}
    every = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = {id(p): p for p in objective.parameters() if p.requires_grad}
    assert sorted(every) == sorted(wanted), "each parameter once"
    assert {key for key, p in wanted.items() if p.ndim < 2} < free
    assert {id(objective.backbone.pos_embed), id(objective.mask_token)} < free
    assert decay.decayed + decay.free == sum(p.numel() for p in wanted.values())


@pytest.mark.parametrize(
    ("settings", "free"),
    [
        ({"name": "heat_completion"}, {"transport.rotation", "transport.raw_decay", "from_rest.transport.rotation"}),
        ({"name": "heat_completion", "rest_law": "table"}, {"from_rest.table"}),
        ({"name": "qb_heat"}, {"law.raw_rotation", "law.raw_decay"}),
        ({"name": "simmim"}, {"prior.laws.0.speed_parts"}),
    ],
)
def test_nothing_pulls_a_law_towards_its_control(settings: dict[str, str], free: set[str]) -> None:
    """Turns that decay to zero are a copy: the law would lose against it by the optimiser's doing."""
    objective = objectives.create(settings, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    objectives.attach_prior(objective, {"name": "hidden_waves", "layers": [-1]})
    optimizer, _ = create_optimizer(objective, OptimizerConfig(name="muon", weight_decay=0.1))
    decayed = {id(p) for group in optimizer.param_groups if group["weight_decay"] for p in group["params"]}
    named = dict(objective.named_parameters())
    assert free <= set(named)
    assert not {name for name in free if id(named[name]) in decayed}
    assert id(named["prior.laws.0.directions"]) in decayed, "matrices are decayed"


def test_an_unknown_name_is_answered_with_the_nearest() -> None:
    objective = objectives.create({"name": "qb_heat"}, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    with pytest.raises(UserError, match="adamw"):
        create_optimizer(objective, OptimizerConfig(name="adamww"))


def refuse(*_: object, **__: object) -> None:
    raise AssertionError("CUDA required for APEX optimizers\nand more")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("adahessian", "second derivatives.*adamw"),
        ("adan", "adan takes 3"),
        ("fusedadam", r"cannot be made here \(CUDA required for APEX optimizers\): try adamw"),
    ],
)
def test_what_cannot_be_made_is_refused(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "fusedadam":  # as where there is no GPU
        monkeypatch.setattr("timm.optim.create_optimizer_v2", refuse)
    objective = objectives.create({"name": "qb_heat"}, create_backbone("vit_tiny_patch16_224", 32, **TINY), 32)
    with pytest.raises(UserError, match=message):
        create_optimizer(objective, OptimizerConfig(name=name))
