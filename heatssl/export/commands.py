"""``heatssl export``: weights as other programs take them."""

from dataclasses import replace
from pathlib import Path
from typing import get_args

from heatssl.backbones import set_input_size
from heatssl.config import ExportConfig, ExportFormat
from heatssl.errors import UserError, did_you_mean, permission_errors
from heatssl.export.backbone_files import is_run, load_backbone, load_head, run_folder
from heatssl.export.onnx_file import check_onnx, write_onnx
from heatssl.export.timm_folder import timm_model, write_timm_folder
from heatssl.files import check_folder


@permission_errors()
def run_export(config: ExportConfig) -> list[Path]:
    """Write the files of every format, print where they are.

    Returns:
        Their paths.

    Raises:
        UserError: on an unknown format, on weights that cannot be read, and when a model cannot be written.
    """
    folder = _folder(config)
    if not config.formats:
        raise UserError("formats is empty: choose formats=[timm], [onnx] or [timm,onnx]")
    for name in config.formats:
        if name not in get_args(ExportFormat):
            raise UserError(f"unknown format {name!r}{did_you_mean(name, get_args(ExportFormat))}")
    if "onnx" in config.formats:
        check_onnx()
    check_folder(folder)
    backbone, info = load_backbone(config.run)
    if config.image_size is not None and config.image_size != info.image_size:
        set_input_size(backbone, config.image_size)
        info = replace(info, image_size=config.image_size)
    head = load_head(config.run)
    model = timm_model(backbone, info, head)
    written: list[Path] = []
    if "timm" in config.formats:
        written += write_timm_folder(folder, model, info, head)
    if "onnx" in config.formats:
        written.append(write_onnx(folder / "model.onnx", model.module, info, head))
    print(f"{info.describe()} -> {model.output}")
    for path in written:
        print(f"-> {path}  {path.stat().st_size / 2**20:.2f} MiB")
    return written


def _folder(config: ExportConfig) -> Path:
    """Where files go: ``export`` of the run, or where the user says."""
    if config.output is not None:
        return Path(config.output)
    if not is_run(config.run):
        raise UserError(f"{config.run} is no run folder to write into: name an output=FOLDER")
    return run_folder(config.run) / "export"
