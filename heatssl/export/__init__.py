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

__all__ = [
    "BackboneInfo",
    "Head",
    "first_mismatch",
    "is_run",
    "keep_backbone",
    "kept_backbones",
    "load_backbone",
    "load_head",
    "run_folder",
    "save_backbone",
]
