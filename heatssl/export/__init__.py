"""Weights as files: those of a run, those that others publish, and what other programs take."""

from heatssl.export.backbone_files import (
    BackboneInfo,
    Head,
    first_mismatch,
    is_run,
    keep_backbone,
    kept_backbones,
    load_backbone,
    load_head,
    run_folder,
    save_backbone,
)
from heatssl.export.timm_folder import TimmModel, timm_model, write_timm_folder

__all__ = [
    "BackboneInfo",
    "Head",
    "TimmModel",
    "first_mismatch",
    "is_run",
    "keep_backbone",
    "kept_backbones",
    "load_backbone",
    "load_head",
    "run_folder",
    "save_backbone",
    "timm_model",
    "write_timm_folder",
]
