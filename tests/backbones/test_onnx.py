"""If these fail, timm's onnx_export cannot export heatssl's models, or writes models of other numbers."""

import pytest
import timm
import torch
from timm.utils.onnx import onnx_export

import heatssl  # noqa: F401 (registers the names)
from heatssl.backbones.norm import RMSNorm

KINDS = {
    "gau": ("gau_tiny_patch16_224", {"embed_dim": 48, "key_width": 16}),
    "flash": ("flash_small_patch16_224", {"embed_dim": 48, "key_width": 16}),
    "flash_chunks": ("flash_small_patch16_224", {"embed_dim": 48, "key_width": 16, "chunk": 3}),
    "rerope": ("gau_tiny_patch16_224", {"embed_dim": 48, "key_width": 16, "positions": "rerope", "position_window": 1}),
    "roformer_v2": ("roformer_v2_small_patch16_224", {"embed_dim": 48, "num_heads": 3}),
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_exporter_of_torchscript_graphs_gives_the_same_numbers(kind, tmp_path):
    pytest.importorskip("onnx")
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    model = timm.create_model(name, depth=1, img_size=32, patch_size=8, num_classes=5, exportable=True, **settings)
    file = str(tmp_path / "model.onnx")
    onnx_export(model, file, input_size=(3, 32, 32), batch_size=2)
    onnxruntime = pytest.importorskip("onnxruntime")
    images = torch.randn(2, 3, 32, 32)
    (found,) = onnxruntime.InferenceSession(file).run(None, {"input0": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), model(images), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("has_weight", [True, False])
def test_the_norm_written_out_is_torchs(has_weight):
    torch.manual_seed(0)
    norm, x = RMSNorm(12, eps=1e-6, elementwise_affine=has_weight), 3 * torch.randn(4, 5, 12)
    if has_weight:
        torch.nn.init.normal_(norm.weight)
    theirs = torch.nn.functional.rms_norm(x, (12,), norm.weight, 1e-6)
    torch.testing.assert_close(norm.plain(x), theirs)
    torch.testing.assert_close(norm(x), theirs)
