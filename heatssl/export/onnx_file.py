"""One ONNX file: normalised images in, features or logits out, any number of images at once."""

import importlib.util
import json
import tempfile
import warnings
from pathlib import Path

import timm
import torch
from torch import nn

from heatssl.errors import UserError
from heatssl.export.backbone_files import BackboneInfo, Head
from heatssl.files import write_atomically

OPSET = 17  # the first with a layer norm of its own


def check_onnx() -> None:
    """See that what writes ONNX is installed.

    Raises:
        UserError: with the command that installs it.
    """
    if importlib.util.find_spec("onnx") is None:
        raise UserError("formats=[onnx] needs the onnx package: pip install 'heatssl[onnx]'")


def write_onnx(path: Path, model: nn.Module, info: BackboneInfo, head: Head | None = None) -> Path:
    """Write the module of :func:`heatssl.export.timm_model`: ``images`` (B, 3, S, S) -> ``features`` or ``logits``.

    The file's metadata have ``mean`` and ``std`` of images in [0, 1], and ``classes`` of logits, as JSON.

    Raises:
        UserError: when onnx is missing, when the model has a step that ONNX lacks, and when the disk is full or cannot
            be written.
    """
    check_onnx()
    import onnx

    output = "features" if head is None else "logits"
    images = torch.zeros(2, 3, info.image_size, info.image_size)
    with tempfile.TemporaryDirectory() as scratch, timm.layers.set_exportable(True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: sizes are fixed on purpose, but for the number of images
        file = Path(scratch) / "model.onnx"
        try:
            torch.onnx.export(
                model,
                (images,),
                file,
                input_names=["images"],
                output_names=[output],
                dynamic_axes={"images": {0: "batch"}, output: {0: "batch"}},
                opset_version=OPSET,
                dynamo=False,
            )
        except (RuntimeError, TypeError) as error:  # torch's own error for a missing step is a RuntimeError
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"{info.name} cannot be written as ONNX ({reason}): use formats=[timm]") from error
        written = onnx.load(file)
    onnx.checker.check_model(written)
    facts = {"mean": json.dumps(info.mean), "std": json.dumps(info.std)}
    if head is not None:
        facts["classes"] = json.dumps(head.classes)
    onnx.helper.set_model_props(written, facts)
    content = written.SerializeToString()
    write_atomically(path, lambda file: file.write(content))
    return path
