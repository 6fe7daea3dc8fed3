"""Layers and poolings: what is read is what the name says, the held-out part alone selects, and the protocol tells."""

from pathlib import Path

import pytest
import timm
import torch

from heatssl.backbones import feature_map, pooled_features
from heatssl.cli import main
from heatssl.config import KnnConfig, ProbeConfig
from heatssl.errors import UserError
from heatssl.evaluation import linear_probe, run_knn, run_probe
from heatssl.evaluation.knn import knn_accuracies, unit_bank
from heatssl.evaluation.readout import FINAL, POOLINGS, Readout, read, readouts_of
from heatssl.evaluation.results import read_results
from heatssl.evaluation.source import digest_of, open_source
from heatssl.evaluation.split_features import split_features, widths

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _vit(**arguments: object) -> torch.nn.Module:
    settings = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_heads": 2, "num_classes": 0}
    torch.manual_seed(0)
    return timm.create_model("vit_tiny_patch16_224", **settings | arguments).eval()


@torch.no_grad()
def test_layers_and_poolings_of_a_vit_are_read_where_they_say() -> None:
    model = _vit()
    seen = []
    model.blocks[1].register_forward_hook(lambda _module, _inputs, output: seen.append(model.norm(output)))
    final = model.forward_features(IMAGES)
    inner = seen.pop()
    expected = {
        Readout(1, "mean"): inner[:, 1:].mean(dim=1),
        Readout(1, "max"): inner[:, 1:].amax(dim=1),
        Readout(1, "class"): inner[:, 0],
        Readout(1, "class_mean"): torch.cat([inner[:, 0], inner[:, 1:].mean(dim=1)], dim=1),
        Readout(2, "class"): final[:, 0],
        Readout(2, "mean"): pooled_features(model, IMAGES),
    }
    wished = readouts_of(model, [-2, 1, -1], list(POOLINGS))
    assert wished[0] == Readout(1, "mean")
    assert len(wished) == 2 * len(POOLINGS)  # -2 and 1 are one layer
    found = dict(zip(wished, read(model, IMAGES, wished), strict=True))
    for readout, features in expected.items():
        torch.testing.assert_close(found[readout], features, rtol=1e-5, atol=1e-6)
    assert widths(model, 32, wished) == [found[readout].shape[1] for readout in wished]
    (token,) = read(model, IMAGES, readouts_of(model, [], ["class"]))
    torch.testing.assert_close(token, final[:, 0])
    assert torch.equal(read(model, IMAGES, (FINAL,))[0], pooled_features(model, IMAGES))


@pytest.mark.parametrize(
    "name", ["test_resnet", "gau_tiny_patch8_96", "flash_small_patch8_96", "swin_tiny_patch4_window7_224"]
)
@torch.no_grad()
def test_stages_and_blocks_of_other_models(name: str) -> None:
    model = timm.create_model(name, num_classes=0).eval()
    images = torch.randn(1, 3, 224 if "224" in name else 96, 224 if "224" in name else 96)
    wished = readouts_of(model, [0, -1], ["mean", "max"])
    found = read(model, images, wished)
    last = len(model.feature_info) - 1
    assert [readout.layer for readout in wished] == [0, 0, last, last]
    torch.testing.assert_close(found[2], feature_map(model, images).mean(dim=(2, 3)), rtol=1e-4, atol=1e-5)
    assert found[0].shape != found[2].shape or not torch.allclose(found[0], found[2])


def test_the_held_out_part_selects_among_features_and_test_does_not() -> None:
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(400) % 4
    noise = torch.randn(400, 8, generator=generator)
    told = torch.randn(400, 6, generator=generator) + 3 * torch.eye(4, 6)[labels]
    split = slice(0, 300), slice(300, 400)
    train, test = ([x[part] for x in (noise, told, noise)] for part in split)
    found = linear_probe(train, labels[split[0]], test, labels[split[1]])
    assert found.reading == 1
    assert found.probe.weight.shape == (4, 6)
    alone = linear_probe(train[1], labels[split[0]], test[1], labels[split[1]])
    assert (found.accuracy, found.selected) == (alone.accuracy, alone.selected)
    shuffled = linear_probe(train, labels[split[0]], test, labels[split[1]].flip(0))
    assert shuffled.reading == 1
    torch.testing.assert_close(shuffled.probe.weight, found.probe.weight)


def test_probe_over_layers_and_poolings_from_the_command_line(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", f"run={run}", "workers=0", "random_init=false"]) == 0
    kept = (run / "probe.safetensors").read_bytes()
    words = ["probe", f"run={run}", "workers=0", "layers=[0,-1]", "pooling=[mean,class]"]
    assert main(words) == 0
    plain, chosen, twin = read_results(run / "evaluation.json")
    assert "selected likewise among layers 0 by mean, class at" in chosen["protocol"]  # the run has one block
    assert chosen["selected"] in ("layer 0, mean over positions", "layer 0, class token")
    assert f"selected: {chosen['selected']}" in capsys.readouterr().out
    assert chosen["protocol"] == twin["protocol"]  # which is how a report finds what belongs together
    assert chosen["key"] != plain["key"]
    assert (run / "probe.safetensors").read_bytes() == kept  # heatmaps read the mean


def test_neighbours_by_the_class_token(run: Path) -> None:
    (result,) = run_knn(KnnConfig(run=str(run), workers=0, pooling="class", random_init=False))
    assert "frozen features (final layer, class token)" in result.protocol
    opened = open_source(KnnConfig(run=str(run), workers=0))
    wished = (Readout(None, "class"),)
    parts = [split_features(opened.backbone, split, opened, 256, wished) for split in ("train", "val")]
    (train_x, train_y), (val_x, val_y) = parts
    bank = unit_bank(train_x, torch.device("cpu"))
    assert [result.accuracy] == list(knn_accuracies(bank, train_y, val_x, val_y, [20], 0.07))
    assert not torch.equal(val_x, split_features(opened.backbone, "val", opened, 256)[0])


def test_few_labels_of_one_layer(run: Path) -> None:
    (result,) = run_probe(ProbeConfig(run=str(run), workers=0, shots=1, pooling=["class"], random_init=False))
    assert "frozen features (final layer, class token)" in result.protocol


def test_numbers_of_the_final_mean_keep_the_key_that_they_had_before_there_were_others(run: Path) -> None:
    config = ProbeConfig(run=str(run), workers=0)
    opened = open_source(config)
    settings = {"protocol", "head", "depth", "solver", "grid", "iterations", "epochs", "held_out", "shots", "share"}
    settings |= {"draws", "seed", "batch_size"}
    before = {name: getattr(config, name) for name in settings}
    shown = [opened.data.image_size, opened.data.mean, opened.data.std]
    expected = digest_of("linear", before, opened._weights_digest, opened.digests, shown)
    assert opened.key("linear", config) == expected


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["probe", "layers=[3]"], "has no layer 3: they are 0 to 0, or -1 to -1"),
        (["probe", "pooling=[sum]"], "unknown pooling 'sum': choose among mean"),
        (["probe", "pooling=[]"], "unknown pooling ''"),
        (["probe", "head=attentive", "layers=[0]"], "has no effect with head=attentive"),
        (["probe", "protocol=mae", "pooling=[class]"], "has no effect with protocol=mae"),
        (["probe", "shots=1", "pooling=[mean,class]"], "leave nothing to select on"),
        (["knn", "pooling=sum"], "unknown pooling 'sum'"),
        (["probe", "grid=[nan]"], "grid must hold positive numbers, not nan"),
        (["probe", "grid=[-1]"], "grid must hold positive numbers, not -1"),
        (["probe", "head=attentive", "grid=[inf]"], "grid must hold positive numbers, not inf"),
        (["probe", "iterations=0"], "must be at least 1"),
        (["probe", "held_out=2"], "between 0 and 1"),
        (["probe", "shots=0"], "shots and draws must be at least 1"),
        (["probe", "shots=1000"], "set shots to at most"),
        (["probe", "share=2"], "share between 0 and 1"),
    ],
)
def test_what_cannot_work_is_told_before_features_cost_time(
    words: list[str], told: str, run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    module = "heatssl.evaluation.split_features"
    for name in ("extract_features", "extract_maps"):
        monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: pytest.fail("extracted first"))
    assert main([words[0], f"run={run}", "workers=0", "random_init=false", *words[1:]]) == 2
    assert told in capsys.readouterr().err


def test_a_class_token_that_is_not_there() -> None:
    with pytest.raises(UserError, match="no class token: use pooling=mean"):
        readouts_of(timm.create_model("gau_tiny_patch8_96"), [], ["class"])


def test_a_probe_that_diverges_is_no_result(run: Path) -> None:
    config = ProbeConfig(run=str(run), workers=0, solver="sgd", grid=[1e38], random_init=False)
    with pytest.raises(UserError, match=r"diverges at 1e\+38"):
        run_probe(config)
    assert not (run / "evaluation.json").exists()
