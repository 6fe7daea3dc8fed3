"""The family of Grad-CAM, held against pytorch-grad-cam's raw maps: its own scaling to [0, 1] would hide a factor."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import pytorch_grad_cam
import timm
import torch
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import Tensor, nn

from heatssl.attribution import attribute, explain
from heatssl.backbones import feature_map, pooled_features
from heatssl.errors import UserError
from heatssl.evaluation import LinearProbe

Create = Callable[..., nn.Module]
PEERS = {
    "gradcam": pytorch_grad_cam.GradCAM,
    "gradcam_plus_plus": pytorch_grad_cam.GradCAMPlusPlus,
    "hirescam": pytorch_grad_cam.HiResCAM,
    "layercam": pytorch_grad_cam.LayerCAM,
    "eigencam": pytorch_grad_cam.EigenCAM,
}


def _of_peer(method: str, model: nn.Module, layer: nn.Module, images: Tensor, **options: Any) -> Tensor:
    """Its maps (B, h, w) as they are before it scales and enlarges them."""
    raw = []

    class Raw(PEERS[method]):  # type: ignore[misc]
        def get_cam_image(self, *arguments: Any, **settings: Any) -> np.ndarray:
            raw.append(super().get_cam_image(*arguments, **settings))
            return raw[-1]

    with Raw(model, [layer], **options) as cam:
        cam(images, [ClassifierOutputTarget(3)] * len(images))
    return torch.as_tensor(raw[0])


def _assert_same(ours: Tensor, peer: Tensor, method: str) -> None:
    if method == "eigencam":  # the sign of a singular vector is free; ours makes the largest magnitude positive
        flipped = peer.amax(dim=(1, 2)) < -peer.amin(dim=(1, 2))
        peer = torch.where(flipped[:, None, None], -peer, peer)
    peer = peer.relu()
    assert peer.amax() > 0
    torch.testing.assert_close(ours, peer, rtol=1e-4, atol=1e-4 * peer.max().item())


@pytest.mark.parametrize("method", PEERS)
@pytest.mark.parametrize("layer", ["layer4", "layer3"])
def test_equals_pytorch_grad_cam_on_a_cnn(small_cnn: Create, images: Tensor, method: str, layer: str) -> None:
    model = small_cnn(num_classes=5)
    model.fc.weight.data *= 1e3  # pytorch-grad-cam adds 1e-6 to squared gradients, which must not matter
    ours = attribute(model, images, method, 3, size="map", normalize=False, layer=layer)
    _assert_same(ours, _of_peer(method, model, model.get_submodule(layer), images), method)


@pytest.mark.parametrize("method", sorted(PEERS.keys() - {"gradcam_plus_plus"}))
@pytest.mark.parametrize("pool", ["token", "avg"])
def test_equals_pytorch_grad_cam_on_a_vit(small_vit: Create, images: Tensor, method: str, pool: str) -> None:
    model = small_vit(num_classes=5, global_pool=pool)
    layer = model.blocks[-1].norm1
    peer = _of_peer(
        method, model, layer, images, reshape_transform=lambda tokens: tokens[:, 1:].mT.unflatten(2, (4, 4))
    )
    ours = attribute(model, images, method, 3, size="map", normalize=False, layer=layer)
    _assert_same(ours, peer, method)


def test_channels_of_negative_sum_cannot_blow_up_grad_cam_plus_plus(small_vit: Create, images: Tensor) -> None:
    """With signed features 2 + g sum(A) can be zero: a weight is half of its positive gradients at most."""
    model = small_vit(num_classes=5, global_pool="avg", fc_norm=False)
    field = feature_map(model, images).detach()
    # Mean pooled: g = w_c / 16 everywhere. Make 2 + g sum(A_0) almost zero for the first image.
    total = field.sum(dim=(2, 3))[0]
    channel = int(total.argmin())
    model.head.weight.data[3, channel] = -16 * 1.999 / total[channel]
    slope = model.head.weight[3].detach() / 16
    weight = 16 * slope.relu() / (2 + slope.relu() * field.sum(dim=(2, 3)).relu())
    expected = torch.einsum("bc,bchw->bhw", weight, field).relu()
    maps = attribute(model, images, "gradcam_plus_plus", 3, size="map", normalize=False)
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-4)
    unguarded = 16 * slope.relu() / (2 + slope.relu() * field.sum(dim=(2, 3)))
    assert unguarded[0, channel] > 100 * weight[0, channel]


def test_cam_has_the_weights_of_the_class_and_the_mean_of_the_score(create: Create, images: Tensor) -> None:
    model = create(num_classes=0)
    field = feature_map(model, images).detach()
    channels = field.shape[1]
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(4, channels, generator=generator)
    probe = LinearProbe(weight, torch.randn(4, generator=generator), torch.zeros(channels), torch.ones(channels))
    maps = attribute(model, images, "cam", 2, probe=probe, size="map", normalize=False)
    torch.testing.assert_close(maps, torch.einsum("c,bchw->bhw", weight[2], field), rtol=1e-4, atol=1e-4)
    score = probe.logits(pooled_features(model, images))[:, 2] - probe.bias[2]
    torch.testing.assert_close(maps.mean(dim=(1, 2)), score.detach(), rtol=1e-4, atol=1e-4)
    own = attribute(model, images, "cam", "self", size="map", normalize=False)
    torch.testing.assert_close(own.mean(dim=(1, 2)), torch.ones(3))


def test_cam_refuses_a_pool_that_weighs_positions(small_cnn: Create, images: Tensor) -> None:
    with pytest.raises(UserError, match="unequally"):
        attribute(small_cnn(num_classes=5, global_pool="max"), images, "cam", 1)


def test_nothing_before_the_layer_is_kept_for_the_backward_pass(small_cnn: Create, images: Tensor) -> None:
    """Memory and half of the time of Grad-CAM: only what stands behind the layer has a graph."""
    model = small_cnn(num_classes=5)
    in_graph: dict[str, bool] = {}
    for name in ("layer1", "layer3", "layer4"):
        model.get_submodule(name).register_forward_hook(
            lambda _module, _inputs, output, name=name: in_graph.update({name: output.requires_grad})
        )
    attribute(model, images, "gradcam", 3, layer="layer3")
    assert in_graph == {"layer1": False, "layer3": False, "layer4": True}


def test_a_layer_whose_output_is_changed_in_place_keeps_its_own_value(images: Tensor) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(4096, 5))
    inplace = attribute(model, images, "hirescam", 3, layer="0", normalize=False)
    model[1] = nn.ReLU()
    torch.testing.assert_close(inplace, attribute(model, images, "hirescam", 3, layer="0", normalize=False))


def test_a_class_token_that_nobody_told_of_makes_no_map_of_zeros(images: Tensor) -> None:
    """The patches of TNT's last layer have no gradient, and no other layer is known to read them."""
    torch.manual_seed(0)
    model = timm.create_model("tnt_s_legacy_patch16_224", img_size=32, depth=1, num_classes=5).eval()
    with pytest.raises(UserError, match="reads the class token alone of the chosen layer: choose an earlier layer="):
        explain(model, images, "gradcam", 1)


def test_windows_are_no_positions(images: Tensor) -> None:
    """Attention of a Swin returns 49 tokens of each window, a grid of the window and not of the image."""
    settings = {"img_size": 56, "embed_dim": 16, "depths": (1, 1), "num_heads": (1, 2), "num_classes": 5}
    model = timm.create_model("swin_tiny_patch4_window7_224", **settings).eval()
    shown = torch.nn.functional.interpolate(images, 56)
    for method in ("gradcam", "eigencam", "layer_integrated_gradients"):
        with pytest.raises(UserError, match="for 3 images, windows or heads: choose another layer"):
            explain(model, shown, method, 1, layer="layers.0.blocks.0.attn")
