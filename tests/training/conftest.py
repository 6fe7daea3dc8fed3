"""A run that takes two seconds: a tiny transformer on small generated shapes."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from heatssl.config import DataConfig, OptimizerConfig, PretrainConfig, TrainerConfig

TINY = {"depth": 2, "embed_dim": 48, "num_heads": 3, "patch_size": 8}

MakeConfig = Callable[..., PretrainConfig]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums over threads round differently with their number: bit-for-bit comparisons need one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_config(output: Path, **settings: Any) -> PretrainConfig:
    """Settings of trainer, optimizer and data by their bare names; others are those of PretrainConfig."""
    parts: dict[str, dict[str, Any]] = {
        "trainer": {
            "steps": 20,
            "batch_size": 8,
            "accelerator": "cpu",
            "log_every": 3,
            "checkpoint_every": 8,
            "knn_every": 10,
            "knn_train_size": 40,
            "knn_val_size": 20,
        },
        "optimizer": {"warmup_steps": 4},
        "data": {"image_size": 32, "train_size": 80, "val_size": 20, "workers": 0},
    }
    schemas = {"trainer": TrainerConfig, "optimizer": OptimizerConfig, "data": DataConfig}
    rest = {}
    for key, value in settings.items():
        part = next(
            (name for name, schema in schemas.items() if key in schema.__dataclass_fields__ and key != "name"),
            None,
        )
        (parts[part] if part else rest)[key] = value
    made = {name: schema(**parts[name]) for name, schema in schemas.items()}
    return PretrainConfig(
        **{"objective": {"name": "qb_heat"}, "backbone_arguments": dict(TINY), "output": str(output), **made, **rest}
    )


@pytest.fixture
def make_config(tmp_path: Path) -> MakeConfig:
    """``make_config("name", steps=5)``: a tiny run in its own folder."""
    return lambda name="run", **settings: tiny_config(tmp_path / name, **settings)
