"""A wrong Grad-CAM still looks plausible, so it is held against captum and planted signals."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from captum.attr import LayerGradCam
from torch import Tensor, nn

from heatssl.attribution import attribute
from heatssl.backbones import feature_map, pooled_features
from heatssl.errors import UserError

Create = Callable[..., nn.Module]


def test_equals_captum_on_a_cnn(small_cnn: Create, images: Tensor) -> None:
    model = small_cnn(num_classes=5)
    reference = LayerGradCam(model, model.layer4).attribute(images, target=3, relu_attributions=True)[:, 0]
    ours = attribute(model, images, "gradcam", 3, size="map", normalize=False)
    assert reference.max() > 0
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-6)
    earlier = LayerGradCam(model, model.layer2).attribute(images, target=3, relu_attributions=True)[:, 0]
    named = attribute(model, images, "gradcam", 3, size="map", normalize=False, layer="layer2")
    torch.testing.assert_close(named, earlier, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_equals_captum_on_a_vit(small_vit: Create, images: Tensor, pool: str) -> None:
    model = small_vit(num_classes=5, global_pool=pool)

    class Grid(nn.Module):
        """Gives captum, which takes dimension 1 for channels, the tokens as an image."""

        def forward(self, field: Tensor) -> Tensor:
            return field

    class Split(nn.Module):
        """The ViT with its last block entered through a field."""

        def __init__(self) -> None:
            super().__init__()
            self.grid, self.model = Grid(), model

        def forward(self, x: Tensor) -> Tensor:
            handle = model.blocks[-1].norm1.register_forward_hook(self._through_grid)
            logits = model(x)
            handle.remove()
            return logits

        def _through_grid(self, _module: nn.Module, _inputs: object, tokens: Tensor) -> Tensor:
            field = self.grid(tokens[:, 1:].transpose(1, 2).unflatten(2, (4, 4)))
            return torch.cat([tokens[:, :1], field.flatten(2).transpose(1, 2)], dim=1)

    split = Split()
    reference = LayerGradCam(split, split.grid).attribute(images, target=2, relu_attributions=True)[:, 0]
    ours = attribute(model, images, "gradcam", 2, size="map", normalize=False, layer=model.blocks[-1].norm1)
    assert reference.max() > 0
    torch.testing.assert_close(ours, reference, rtol=1e-4, atol=1e-7)
    if pool == "token":
        torch.testing.assert_close(attribute(model, images, "gradcam", 2, size="map", normalize=False), ours)


def test_self_is_the_exact_share_of_each_position_in_the_cosine(create: Create, images: Tensor) -> None:
    """The trap: the plain gradient of the cosine to oneself is zero."""
    model = create(num_classes=0)
    field = feature_map(model, images).detach()
    unit = F.normalize(field.mean(dim=(2, 3)), dim=1)
    share = (field * unit[:, :, None, None]).sum(1) / field.mean(dim=(2, 3)).norm(dim=1)[:, None, None]
    torch.testing.assert_close(share.mean(dim=(1, 2)), torch.ones(3))
    # Grad-CAM averages the gradient over positions: the share of each position in the sum.
    expected = share.relu() / share[0].numel()
    ours = attribute(model, images, "gradcam", "self", size="map", normalize=False)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-7)


def test_self_equals_the_own_embedding_given_as_target(create: Create, images: Tensor) -> None:
    model = create(num_classes=0)
    own = pooled_features(model, images).detach()
    torch.testing.assert_close(attribute(model, images, target=own), attribute(model, images))


class Planted(nn.Module):
    """Class k is the brightness of quadrant k: the right map is known."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, kernel_size=1)
        self.conv.weight.data.fill_(1.0)
        self.conv.bias.data.zero_()

    def forward(self, x: Tensor) -> Tensor:
        field = F.avg_pool2d(self.conv(x), 4)
        top, bottom = field.chunk(2, dim=2)
        quadrants = [*top.chunk(2, dim=3), *bottom.chunk(2, dim=3)]
        return torch.stack([quadrant[:, k].mean(dim=(1, 2)) for k, quadrant in enumerate(quadrants)], dim=1)


def test_finds_the_planted_bright_spot() -> None:
    image = torch.zeros(1, 3, 32, 32)
    image[:, :, 4:12, 20:28] = 1.0
    maps = attribute(Planted(), image, "gradcam", 1, layer="conv")
    assert maps[:, 4:12, 20:28].sum() > 0.99 * maps.sum() > 0


def test_an_unread_layer_is_refused(small_cnn: Create, images: Tensor) -> None:
    with pytest.raises(UserError, match="no layer 'layer9'"):
        attribute(small_cnn(num_classes=5), images, target=1, layer="layer9")
    with pytest.raises(UserError, match="takes no part"):
        attribute(small_cnn(num_classes=5), images, target="self", layer="fc")
    with pytest.raises(UserError, match="layer="):
        attribute(Planted(), images, target=1)
