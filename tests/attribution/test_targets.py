"""A wrong target explains something else than asked for, and its heatmap looks no worse."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heatssl.attribution import attribute
from heatssl.attribution.targets import channel, entropy, make_target, margin, neighbours, region
from heatssl.backbones import feature_map, pooled_features
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

Create = Callable[..., nn.Module]
EVERY = torch.arange(3)


@torch.no_grad()
def value(model: nn.Module, images: Tensor, target: object, probe: LinearProbe | None = None) -> Tensor:
    return make_target(model, images, target, probe)(images, EVERY)


@pytest.mark.parametrize("method", ["gradcam", "integrated_gradients"])
@pytest.mark.parametrize("kind", ["margin", "entropy", "channel:7", "region", "neighbours"])
def test_each_gives_a_map_of_every_family(create: Create, images: Tensor, method: str, kind: str) -> None:
    model = create(num_classes=0)
    bank = pooled_features(model, torch.randn(30, 3, 32, 32)).detach()
    weight = torch.rand(4, bank.shape[1], generator=torch.Generator().manual_seed(3))
    probe = LinearProbe(weight, torch.zeros(4), torch.zeros(len(weight[0])), torch.ones(len(weight[0])))
    target = {
        "region": region(images[0], (0.2, 0.2, 0.6, 0.6)),
        "neighbours": neighbours(bank, torch.arange(30) % 3, k=5),
    }
    options = {"steps": 2} if method == "integrated_gradients" else {}
    maps = attribute(model, images, method, target.get(kind, kind), probe=probe, **options)
    assert maps.shape == (3, 32, 32)
    assert maps.min() >= 0
    # Grad-CAM is empty where every position lowers the target.
    assert maps.amax() == 1 or (method, kind) == ("gradcam", "entropy")


def test_a_channel_is_its_mean_over_positions(create: Create, images: Tensor) -> None:
    model = create(num_classes=0)
    torch.testing.assert_close(value(model, images, channel(5)), feature_map(model, images)[:, 5].mean(dim=(1, 2)))
    torch.testing.assert_close(value(model, images, "channel:5"), value(model, images, channel(5)))


def test_margin_and_entropy_are_those_of_the_logits(small_vit: Create, images: Tensor) -> None:
    model = small_vit(num_classes=5)
    logits = model(images).detach()
    best = logits.topk(2, dim=1).values
    torch.testing.assert_close(value(model, images, "margin"), best[:, 0] - best[:, 1])
    losing = logits.argmin(dim=1)
    torch.testing.assert_close(value(model, images, margin(losing)), logits.amin(dim=1) - best[:, 0])
    expected = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close(value(model, images, entropy()), expected)
    torch.testing.assert_close(
        value(model, images, margin(2), probe=None), value(model, images, margin(torch.tensor([2, 2, 2])))
    )


def test_a_flat_classifier_is_as_unsure_as_can_be(small_vit: Create, images: Tensor) -> None:
    probe = LinearProbe(torch.zeros(4, 48), torch.zeros(4), torch.zeros(48), torch.ones(48))
    torch.testing.assert_close(value(small_vit(num_classes=0), images, "entropy", probe), torch.full((3,), 4.0).log())


def test_neighbours_outvote_the_nearest_one(small_vit: Create, images: Tensor) -> None:
    """One twin of another class must not decide when two of the true class stand near."""
    model = small_vit(num_classes=0)
    own = F.normalize(pooled_features(model, images).detach(), dim=1)
    generator = torch.Generator().manual_seed(0)
    near = own[:1] + 0.02 * torch.randn(2, 48, generator=generator)
    bank = torch.cat([3 * own[:1], near, -own])  # lengths play no part
    labels = torch.tensor([7, 4, 4, 1, 1, 1])
    target = make_target(model, images[:1], neighbours(bank, labels, k=3), None)
    cosine = F.normalize(near, dim=1) @ own[0]
    weight = ((cosine - 1) / 0.07).exp()
    assert weight.sum() > 1
    expected = F.normalize((weight[:, None] * F.normalize(near, dim=1)).sum(dim=0), dim=0)
    torch.testing.assert_close(target.reference[0], expected)
    alone = make_target(model, images[:1], neighbours(bank, labels, k=1), None)
    torch.testing.assert_close(alone.reference[0], own[0])


def test_a_region_is_the_mean_of_the_positions_inside(create: Create, images: Tensor) -> None:
    model = create(num_classes=0)
    field = feature_map(model, images[:1]).detach()[0]  # (C, 4, 4)
    for box, expected in {
        (0.0, 0.0, 1.0, 1.0): field.mean(dim=(1, 2)),
        (0.5, 0.0, 1.0, 0.5): field[:, :2, 2:].mean(dim=(1, 2)),  # right half of the upper half
        (0.3, 0.9, 0.3, 0.9): field[:, 3, 1],  # a point: the position that it lies in
    }.items():
        target = make_target(model, images, region(images[0], box))
        torch.testing.assert_close(target.reference, F.normalize(expected, dim=0))


def test_position_by_position_a_region_gives_the_map_of_cosines(create: Create, images: Tensor) -> None:
    model = create(num_classes=0)
    target = make_target(model, images, region(images[1], (0.25, 0.25, 0.5, 0.5)))
    field = feature_map(model, images).detach().requires_grad_()

    class Head(nn.Module):
        def forward_features(self, field: Tensor) -> Tensor:
            return field

    target.model = Head()
    score = target(field, EVERY, local=True)
    (slope,) = torch.autograd.grad(score.sum(), field)
    cosine = torch.cosine_similarity(field, target.reference[None, :, None, None], dim=1)
    torch.testing.assert_close((slope * field).sum(dim=1), cosine / 16)
    torch.testing.assert_close(score, cosine.mean(dim=(1, 2)))


def test_bad_input_names_the_fix(small_vit: Create, images: Tensor) -> None:
    plain = small_vit(num_classes=0)
    bank, labels = torch.randn(4, 48), torch.zeros(4, dtype=torch.long)
    for message, target in {
        "from 0 to 47": "channel:48",
        "use 'self'": "chanel:4",
        "no classifier": "margin",
        "extract them with it": neighbours(bank[:, :7], labels, k=2),
    }.items():
        with pytest.raises(UserError, match=message):
            attribute(plain, images, target=target)
    with pytest.raises(UserError, match="two classes"):
        attribute(small_vit(num_classes=1), images, target="margin")
    with pytest.raises(UserError, match="not inside the image"):
        region(images[0], (0.5, 0.5, 0.4, 1))
    with pytest.raises(UserError, match="k=9"):
        neighbours(bank, labels, k=9)
