"""A law on intermediate layers: beside any objective, on any backbone, and with no cheap way out."""

import copy
import inspect
import math

import pytest
import torch
import yaml
from torch import nn

from heatssl import heat, objectives
from heatssl.backbones import create_backbone, feature_map, patches_shown, pooled_features
from heatssl.config_folder import config_folder, options
from heatssl.errors import UserError
from heatssl.heat import relative_residual
from heatssl.objectives import Objective, Outputs, attach_prior
from heatssl.objectives.mae import MAE

TINY = {"depth": 3, "embed_dim": 48, "num_heads": 3, "patch_size": 8}
PRIORS = [name for name in options("prior") if name != "none"]


NOTHING = Outputs(torch.zeros(()), {}, torch.zeros(1, 1, 1, 1))


class Supervised(Objective):
    """A plain classifier: the prior must not depend on how we pretrain."""

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(channels, 4)

    def forward(self, images: torch.Tensor) -> Outputs:
        field = feature_map(self.backbone, images)
        loss = nn.functional.cross_entropy(self.head(field.mean(dim=(2, 3))), torch.arange(len(images)) % 4)
        return Outputs(loss, {"loss/class": loss.detach()}, field.detach())


def vit(size: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("vit_tiny_patch16_224", size, **TINY)


def settings(name: str, **changed) -> dict:
    return yaml.safe_load((config_folder() / "prior" / f"{name}.yaml").read_text()) | changed


@pytest.mark.parametrize("name", PRIORS)
def test_every_law_beside_a_supervised_loss(name):
    objective = Supervised(vit(), 48).eval()
    images = torch.randn(4, 3, 32, 32)
    plain = objective(images)
    attach_prior(objective, settings(name, weight=0.5, layers=[0, "blocks.2"]))
    outputs = objective(images)
    logged = [outputs.logs["prior/blocks.0"], outputs.logs["prior/blocks.2"]]
    assert outputs.loss.item() == pytest.approx((plain.loss + 0.5 * sum(logged) / 2).item(), rel=1e-5)
    assert outputs.logs["loss/class"] == plain.logs["loss/class"]
    outputs.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.prior.parameters())
    assert len(objective.prior.laws) == 2


def test_the_logged_residual_is_that_of_the_layers_field():
    objective = Supervised(vit(), 48).eval()
    images = torch.randn(2, 3, 32, 32)
    seen = []
    objective.backbone.blocks[1].register_forward_hook(lambda _m, _i, output: seen.append(output))
    attach_prior(objective, settings("laplace", layers=[1]))
    logs = objective(images).logs
    field = seen[0][:, 1:].transpose(1, 2).unflatten(2, (4, 4)).detach()  # without the class token
    centred = field - field.mean(dim=(0, 2, 3), keepdim=True)
    expected = heat.laplacian(field).square().mean() / centred.square().mean()
    assert logs["prior/blocks.1"].item() == pytest.approx(expected.item(), rel=1e-4)


def asked_of(law: heat.Law) -> list[torch.Tensor]:
    """The fields that a law's loss will be asked of."""
    fields, loss = [], law.loss
    law.loss = lambda field: (fields.append(field), loss(field))[1]
    return fields


def test_qb_heat_is_watched_on_its_visible_quarter():
    objective = objectives.create({"name": "qb_heat"}, vit(64), 64)
    attach_prior(objective, settings("first_order", layers=[-1]))
    fields = asked_of(objective.prior.laws[0])
    outputs = objective(torch.randn(4, 3, 64, 64))
    assert [tuple(field.shape) for field in fields] == [(4, 48, 4, 4)]  # of an 8x8 grid
    assert outputs.logs.keys() >= {"loss/hidden", "prior/blocks.2"}
    assert set(objective.maps(torch.randn(4, 3, 64, 64))) >= {"visible", "law_residual"}


@pytest.mark.parametrize("name", PRIORS)
def test_scattered_patches_are_boundary_conditions(name):
    """Under MAE a layer's values are held where patches are visible, and each hidden one is its neighbours' mean."""
    objective = objectives.create(
        {"name": "mae", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}, vit(64), 64
    )
    attach_prior(objective, settings(name, weight=0.5, layers=[1]))
    tokens, shown, fields = [], [], asked_of(objective.prior.laws[0])
    objective.backbone.blocks[1].register_forward_hook(lambda _m, _i, output: tokens.append(output[:, 1:]))
    objective.backbone.blocks[1].register_forward_hook(lambda *_: shown.append(patches_shown()))
    outputs = objective(torch.randn(2, 3, 64, 64))
    (field,), (values,), ((visible, grid),) = fields, tokens, shown
    assert grid == (8, 8)
    assert field.shape == (2, 48, 8, 8)
    held = torch.take_along_dim(field.flatten(2).transpose(1, 2), visible[..., None], dim=1)
    assert torch.allclose(held, values, atol=1e-5)
    hidden = torch.ones(2, 64, dtype=torch.bool).scatter(1, visible, False).unflatten(1, (8, 8))
    kinks = heat.laplacian(field, boundary="replicate").abs().amax(dim=1)
    assert kinks[hidden].max() < 1e-4 < 0.1 < kinks[~hidden].mean()
    outputs.loss.backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in objective.prior.parameters())
    assert patches_shown() is None


def test_views_of_another_size_are_fields_of_their_own():
    """LeJEPA's local views have fewer patches than the images: they must not be laid out on the images' grid."""
    objective = objectives.create({"name": "lejepa", "head_width": 16, "local_views": 1}, vit(64), 64)
    attach_prior(objective, settings("laplace", layers=[1]))
    fields, tokens = asked_of(objective.prior.laws[0]), []
    objective.backbone.blocks[1].register_forward_hook(lambda _m, _i, output: tokens.append(output[:, 1:]))
    objective(torch.randn(2, 3, 64, 64))
    assert {tuple(field.shape[2:]) for field in fields} > {(8, 8)}, "global and local views"
    for field, values in zip(fields, tokens, strict=True):
        torch.testing.assert_close(field.flatten(2).transpose(1, 2), values, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "layer"), [("test_resnet", "layer3"), ("test_convnext", "stages.1")])
def test_convolutional_backbones(name, layer):
    torch.manual_seed(0)
    backbone = create_backbone(name, 96)
    objective = Supervised(backbone, pooled_features(backbone, torch.zeros(1, 3, 96, 96)).shape[1])
    attach_prior(objective, settings("laplace", layers=[layer]))
    assert objective(torch.randn(2, 3, 96, 96)).logs[f"prior/{layer}"] > 0


@pytest.mark.parametrize("name", ["laplace", "first_order"])
def test_neither_shrinking_nor_a_large_constant_lowers_the_residual(name):
    law = heat.Laplace() if name == "laplace" else heat.FirstOrder(6)
    field = torch.randn(4, 6, 5, 5)
    start = relative_residual(law, field).item()
    assert relative_residual(law, 1e-3 * field).item() == pytest.approx(start, rel=1e-4)
    assert relative_residual(law, field + 100 * torch.randn(1, 6, 1, 1)).item() >= 0.99 * start
    smooth = heat.heat_semigroup(field, 1.0)
    assert relative_residual(law, smooth).item() < 0.5 * start
    assert relative_residual(law, torch.ones(2, 6, 5, 5)).isfinite()


@pytest.mark.parametrize("kind", ["supervised", "mae"])
def test_following_the_prior_makes_a_layer_obey(kind):
    decoder = {"decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}
    objective = (
        Supervised(vit(), 48) if kind == "supervised" else objectives.create({"name": "mae"} | decoder, vit(), 32)
    )
    objective.eval()
    attach_prior(objective, settings("laplace", weight=1.0))
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)  # MAE's mask
    before = objective(images)
    before.loss.backward()
    with torch.no_grad():
        for parameter in objective.backbone.parameters():
            if parameter.grad is not None:
                parameter.sub_(1e-2 * parameter.grad)
    torch.manual_seed(1)
    assert objective(images).logs["prior/blocks.2"] < before.logs["prior/blocks.2"]


def nothing_is_kept(prior: nn.Module) -> bool:
    return all(watcher.seen is None for watcher in prior._watchers)


def test_outside_the_objective_nothing_is_kept_and_none_adds_nothing():
    objective = Supervised(vit(), 48)
    attach_prior(objective, {"name": "none"})
    assert not hasattr(objective, "prior")
    names = set(objective.state_dict())
    attach_prior(objective, settings("laplace"))
    feature_map(objective.backbone, torch.randn(2, 3, 32, 32))
    assert nothing_is_kept(objective.prior)
    objective(torch.randn(2, 3, 32, 32))
    assert nothing_is_kept(objective.prior)
    assert set(objective.state_dict()) == names  # Laplace has no parameters, and the backbone's keep their names


def test_half_precision_does_not_reach_the_differences():
    objective = Supervised(vit(), 48).eval()
    attach_prior(objective, settings("laplace"))
    images = torch.randn(2, 3, 32, 32)
    seen = asked_of(objective.prior.laws[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = objective(images)
    assert [field.dtype for field in seen] == [torch.float32]
    assert outputs.logs["prior/blocks.2"].item() == pytest.approx(
        objective(images).logs["prior/blocks.2"].item(), rel=0.05
    )


@pytest.mark.parametrize(
    ("changed", "fix"),
    [
        ({"name": "transport"}, "unknown law 'transport'"),
        ({"name": "laplas"}, "laplace"),
        ({"layers": ["blocks.33"]}, "did you mean 'blocks"),
        ({"layers": [7]}, "no layer 7"),
        ({"layers": []}, r"layers=\[-1\]"),
        ({"layers": [-1, 0, "blocks.2"]}, "names blocks.2 more than once"),
        ({"weight": -1.0}, "weight=-1.0 must be 0 or more"),
        ({"weight": math.nan}, "weight=nan"),
        ({"spacing": math.nan}, "spacing=nan is no number"),
        ({"stencil": "7pt"}, "5pt, 9pt"),
        ({"colour": 1}, "colour"),
    ],
)
def test_bad_settings_name_the_fix(changed, fix):
    with pytest.raises(UserError, match=fix):
        attach_prior(Supervised(vit(), 48), settings("laplace") | changed)


def test_what_is_no_field_is_refused_when_it_is_met():
    small = objectives.create({"name": "qb_heat"}, vit(), 32)  # a quarter of 2x2
    attach_prior(small, settings("laplace"))
    with pytest.raises(UserError, match="at least 3x3"):
        small(torch.randn(4, 3, 32, 32))
    scattered = Supervised(vit(), 48)
    attach_prior(scattered, settings("laplace"))
    scattered.prior.begin(torch.randn(2, 3, 32, 32))
    scattered.backbone.blocks(torch.randn(2, 6, 48))
    with pytest.raises(UserError, match="prior=none"):
        scattered.prior.add_to(NOTHING)
    idle = Supervised(vit(), 48)
    attach_prior(idle, settings("laplace"))
    idle.prior.begin(torch.randn(2, 3, 32, 32))
    with pytest.raises(UserError, match="takes no part"):
        idle.prior.add_to(NOTHING)


@pytest.mark.parametrize("name", PRIORS)
def test_the_yaml_of_a_prior_is_the_signature_of_its_law(name):
    given = settings(name)
    assert (given.pop("name"), given.pop("weight"), given.pop("layers")) == (name, 0.01, [-1])
    law = getattr(heat, "".join(part.capitalize() for part in name.split("_")))
    parameters = inspect.signature(law.__init__).parameters.values()
    assert given == {p.name: p.default for p in parameters if p.name not in ("self", "channels")}


@pytest.mark.slow
def test_a_compiled_backbone_is_watched_as_well():
    from heatssl.training.compiling import compile_parts

    objective = objectives.create(
        {"name": "mae", "decoder_width": 24, "decoder_depth": 1, "decoder_heads": 2}, vit(), 32
    )
    attach_prior(objective, settings("first_order", weight=0.5))
    images = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    expected = objective(images)
    compile_parts(objective.backbone)
    torch.manual_seed(1)
    outputs = objective(images)
    assert outputs.logs["prior/blocks.2"].item() == pytest.approx(expected.logs["prior/blocks.2"].item(), rel=1e-3)
    outputs.loss.backward()
    assert all(p.grad is not None for p in objective.prior.parameters())


@pytest.mark.parametrize("law", ["laplace", "first_order"])
def test_gradient_checkpointing_changes_no_gradient(law):
    gradients = []
    for keeps in (True, False):
        torch.manual_seed(0)
        objective = MAE(vit(), 32, decoder_depth=1, decoder_width=32, decoder_heads=2)
        attach_prior(objective, settings(law, weight=0.5, layers=[0, -1]))
        objective.backbone.set_grad_checkpointing(not keeps)
        torch.manual_seed(1)
        objective(torch.randn(4, 3, 32, 32)).loss.backward()
        gradients.append([parameter.grad for parameter in objective.parameters() if parameter.grad is not None])
    assert len(gradients[0]) > 20
    for kept, again in zip(*gradients, strict=True):
        torch.testing.assert_close(again, kept)


def test_a_copy_has_a_prior_of_its_own():
    objective = Supervised(vit(), 48)
    attach_prior(objective, settings("first_order", weight=0.5))
    twin = copy.deepcopy(objective)
    twin(torch.randn(4, 3, 32, 32)).loss.backward()
    assert all(parameter.grad is not None for parameter in twin.prior.parameters())
    assert all(parameter.grad is None for parameter in objective.parameters())


def test_after_an_objective_has_failed_nothing_is_kept():
    objective = Supervised(vit(), 48)
    attach_prior(objective, settings("laplace", weight=0.5))
    objective.head = nn.Linear(3, 4)
    with pytest.raises(RuntimeError):
        objective(torch.randn(4, 3, 32, 32))
    feature_map(objective.backbone, torch.randn(4, 3, 32, 32))
    assert nothing_is_kept(objective.prior)


@pytest.mark.parametrize("name", ["heat_flow", "free_linear", "multilayer_perceptron", "copy"])
def test_what_is_no_law_of_one_field_is_refused(name):
    with pytest.raises(UserError, match=f"unknown law '{name}'"):
        attach_prior(Supervised(vit(), 48), {"name": name, "weight": 0.5})


def test_a_boundary_that_no_law_has_is_refused_at_the_start():
    with pytest.raises(UserError, match="unknown boundary 'periodic'"):
        attach_prior(Supervised(vit(), 48), settings("laplace", boundary="periodic"))


def test_reentrant_checkpointing_under_which_it_had_no_gradient_is_refused(monkeypatch):
    objective, images = Supervised(vit(), 48), torch.randn(4, 3, 32, 32)
    attach_prior(objective, settings("laplace", weight=0.5))
    monkeypatch.setattr("timm.layers.config._USE_REENTRANT_CKPT", True)
    objective(images)
    objective.backbone.set_grad_checkpointing(True)
    with pytest.raises(UserError, match="reentrant checkpointing"):
        objective(images)
