"""config.yaml of a run folder: what the run is. Written first, read by everything that comes after."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import yaml

from heatssl.config import KEEPS_RESULT, PretrainConfig
from heatssl.errors import UserError

MISSING = "unset"  # stands for a key that only one of two configurations has


def save_config(config: PretrainConfig, path: str | Path) -> None:
    """Write ``config`` as plain YAML; a reader sees the old file or the new one, never half of one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        unfinished.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")
        unfinished.replace(path)
    except OSError:
        unfinished.unlink(missing_ok=True)
        raise


def load_config(path: str | Path) -> PretrainConfig:
    """Read what :func:`save_config` wrote; keys that are missing (an older file) take their defaults.

    Raises:
        UserError: when there is no such file, or it is no configuration of a pretraining run.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is missing: {path.parent} is not a run folder; name one with run=PATH")
    try:
        stored = OmegaConf.create(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
        config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(PretrainConfig), stored))
    except (OmegaConfBaseException, yaml.YAMLError, UnicodeDecodeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path} cannot be read as the configuration of a run: {reason}") from error
    assert isinstance(config, PretrainConfig)
    return config


def differences(stored: PretrainConfig, asked: PretrainConfig) -> list[str]:
    """Keys in which two runs would give different results, as ``trainer.steps=1500 (asked: 10)``.

    Empty: they are the same run. What only changes speed or bookkeeping is left out
    (``heatssl.config.KEEPS_RESULT``).
    """
    there, here = flatten(dataclasses.asdict(stored)), flatten(dataclasses.asdict(asked))
    keys = [key for key in dict.fromkeys([*there, *here]) if key not in KEEPS_RESULT]
    changed = [key for key in keys if there.get(key, MISSING) != here.get(key, MISSING)]
    return [f"{key}={there.get(key, MISSING)} (asked: {here.get(key, MISSING)})" for key in changed]


def flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"trainer": {"steps": 3}}`` -> ``{"trainer.steps": 3}``; lists are values, empty dicts vanish."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            leaves |= flatten(value, f"{prefix}{key}.")
        else:
            leaves[f"{prefix}{key}"] = value
    return leaves
