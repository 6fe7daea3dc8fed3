"""Small models of both families, with and without classifier, and a run folder."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from heatssl.backbones import create_backbone
from heatssl.config import DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.data import open_split
from heatssl.evaluation import LinearProbe, save_probe
from heatssl.evaluation.source import fingerprint
from heatssl.export import BackboneInfo, save_backbone

Create = Callable[..., nn.Module]
ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=20, val_size=20, workers=0)


def _small_vit(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    size = {"depth": 2, "embed_dim": 48, "num_heads": 3, "img_size": 32, "patch_size": 8}
    return timm.create_model("vit_tiny_patch16_224", **(size | arguments)).eval()


def _small_cnn(**arguments: Any) -> nn.Module:
    torch.manual_seed(0)
    model = timm.create_model("resnet10t", output_stride=8, channels=(8, 16, 24, 32), stem_width=8, **arguments).eval()
    # An untrained one is linear along the path from zero: statistics as after training bend it.
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.bias.data.normal_(std=0.3)
            module.running_mean.normal_(std=0.3)
    return model


@pytest.fixture
def small_vit() -> Create:
    """A ViT of two blocks on a 4 x 4 grid."""
    return _small_vit


@pytest.fixture
def small_cnn() -> Create:
    """A ResNet of ten layers: a 4 x 4 map at 32 pixels."""
    return _small_cnn


@pytest.fixture(params=["vit", "cnn"])
def create(request: pytest.FixtureRequest) -> Create:
    """Each of the two in turn."""
    return _small_vit if request.param == "vit" else _small_cnn


@pytest.fixture(scope="session")
def kinds() -> dict[str, nn.Module]:
    """A classifier of five classes of each kind of backbone, all on a 4 x 4 grid."""
    torch.manual_seed(0)
    size: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_classes": 5}
    return {
        "vit, class token": _small_vit(num_classes=5),
        "vit, registers, mean": _small_vit(num_classes=5, global_pool="avg", reg_tokens=2),
        "cnn": _small_cnn(num_classes=5),
        "gau": timm.create_model("gau_small_patch16_224", key_width=16, **size).eval(),
        "flash": timm.create_model("flash_small_patch16_224", key_width=16, **size).eval(),
        "roformer_v2": timm.create_model("roformer_v2_small_patch16_224", num_heads=3, **size).eval(),
    }


@pytest.fixture
def images() -> Tensor:
    """Three normalised images (3, 3, 32, 32)."""
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained run with a probe that was never trained either."""
    torch.manual_seed(0)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(tmp_path, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std))
    save_config(PretrainConfig(data=DATA, backbone_arguments=dict(ARGUMENTS)), tmp_path / "config.yaml")
    probe = LinearProbe(torch.randn(10, 24), torch.zeros(10), torch.zeros(24), torch.ones(24))
    save_probe(tmp_path / "probe.safetensors", probe, open_split(DATA, "val").classes, fingerprint(backbone))
    return tmp_path
