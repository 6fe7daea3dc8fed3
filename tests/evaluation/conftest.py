"""A run folder to evaluate."""

from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heatssl.backbones import create_backbone
from heatssl.config import DataConfig, PretrainConfig
from heatssl.config_file import save_config
from heatssl.evaluation import feature_cache, split_features
from heatssl.export import BackboneInfo, save_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)


@pytest.fixture(autouse=True)
def features_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each test starts without features, on disk and in memory."""
    monkeypatch.setattr(feature_cache, "folder", lambda: tmp_path / "features")
    monkeypatch.setattr(split_features, "_features", OrderedDict())
    return tmp_path / "features"


def _write_run(folder: Path, seed: int = 3) -> Path:
    """A run folder whose backbone was never trained."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(folder, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std, step=7))
    save_config(PretrainConfig(data=DATA, backbone_arguments=dict(ARGUMENTS)), folder / "config.yaml")
    return folder


@pytest.fixture
def write_run() -> Callable[..., Path]:
    """Write an untrained run into a folder, from a seed."""
    return _write_run


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained run."""
    return _write_run(tmp_path / "run")
