"""The commands' numbers end up in papers: right weights, right split, right entry, nothing stale."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tqdm import tqdm

from heatssl.backbones import create_backbone
from heatssl.cli import main
from heatssl.config import DataConfig, KnnConfig, ProbeConfig
from heatssl.config_file import load_config
from heatssl.data import Subset, open_split
from heatssl.errors import UserError
from heatssl.evaluation import (
    extract_features,
    extract_maps,
    features,
    knn_accuracy,
    load_probe,
    run_knn,
    run_probe,
    source,
)
from heatssl.evaluation.results import Result, append_results, read_results
from heatssl.evaluation.whitening import Whitening
from heatssl.export import load_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)


def test_features_are_in_order_and_do_not_depend_on_the_batch(run: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS).train()
    data = open_split(DATA, "val")
    whole, labels = extract_features(backbone, data, DATA, batch_size=40)
    parts, _ = extract_features(backbone, data, DATA, batch_size=7)
    assert whole.shape == (40, 24)
    assert labels.tolist() == data.labels
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert backbone.training


@pytest.mark.parametrize(("images", "world"), [(40, 3), (7, 2), (5, 4)])
def test_shares_of_processes_are_the_whole_bit_for_bit(images: int, world: int) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    data = Subset(open_split(DATA, "val"), range(images))
    whole = extract_features(backbone, data, DATA, batch_size=4)
    shares = [extract_features(backbone, data, DATA, batch_size=4, rank=rank, world=world) for rank in range(world)]
    for one, parts in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(torch.cat([part for part in parts if len(part)]), one)
    assert max(len(labels) for _, labels in shares) <= -(-images // world // 4) * 4 + 4


def test_several_k_have_a_row_each(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["knn", f"run={run}", "workers=0", "k=[5,20]"]) == 0
    entries = read_results(run / "evaluation.json")
    assert [(entry["metric"], entry["weights"]) for entry in entries] == [
        ("5-NN", "pretrained"),
        ("20-NN", "pretrained"),
        ("5-NN", "random_init"),
        ("20-NN", "random_init"),
    ]
    (alone,) = run_knn(KnnConfig(run=str(run), workers=0, random_init=False))
    assert alone.metric == "knn"
    assert (alone.accuracy, alone.protocol) == (entries[1]["accuracy"], entries[1]["protocol"])
    assert entries[0]["protocol"] in capsys.readouterr().out


def test_neighbours_among_whitened_features(run: Path) -> None:
    """The same as of features that were whitened beforehand; and the protocol says so."""
    (result,) = run_knn(KnnConfig(run=str(run), workers=0, shrinkage=0.1, random_init=False))
    assert "mean-pooled frozen features whitened, correlations shrunk by 0.1 at" in result.protocol
    data = load_config(run / "config.yaml").data
    backbone = load_backbone(str(run))[0]
    (train_x, train_y), (test_x, test_y) = (
        extract_features(backbone, open_split(data, split), data) for split in ("train", "val")
    )
    whiten = Whitening(train_x, 0.1)
    assert result.accuracy == knn_accuracy(whiten(train_x), train_y, whiten(test_x), test_y, temperature=0.07)
    with pytest.raises(UserError, match="shrinkage=2 must be"):
        run_knn(KnnConfig(run=str(run), workers=0, shrinkage=2.0))


def test_a_grid_that_was_chosen_is_part_of_the_protocol(run: Path) -> None:
    (result,) = run_probe(ProbeConfig(run=str(run), workers=0, random_init=False, grid=[0.1, 1.0]))
    assert "L2 selected among 0.1, 1 on 10 % of train" in result.protocol


def test_four_blocks_stand_beside_one(run: Path) -> None:
    for depth in (1, 4):
        words = ["head=block", f"depth={depth}", "epochs=1", "random_init=false", "workers=0"]
        assert main(["probe", f"run={run}", *words]) == 0
    one, four = read_results(run / "evaluation.json")
    assert (one["metric"], four["metric"]) == ("block", "4 blocks")
    assert four["protocol"].startswith("4 transformer blocks, mean over positions")


def test_maps_are_what_features_are_the_mean_of_and_can_be_trained_on() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    data = open_split(DATA, "val")
    maps, labels = extract_maps(backbone, data, DATA, batch_size=7)
    pooled, _ = extract_features(backbone, data, DATA, batch_size=40)
    assert maps.shape == (40, 24, 4, 4)
    assert labels.tolist() == data.labels
    torch.testing.assert_close(maps.float().mean((2, 3)), pooled, rtol=0.01, atol=0.002)
    assert not maps.is_inference()


class _Unreadable(Subset):
    """Some files are damaged."""

    def load(self, i: int):
        if i % 4 == 0:
            raise OSError("truncated")
        return super().load(i)


def test_unreadable_images_are_left_out_of_both_features_and_labels() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    data = _Unreadable(open_split(DATA, "val"), range(40))
    x, y = extract_features(backbone, data, dataclasses.replace(DATA, bad_fraction=0.5), batch_size=16)
    assert len(x) == len(y) == 30
    maps, labels = extract_maps(backbone, data, dataclasses.replace(DATA, bad_fraction=0.5), batch_size=16)
    assert torch.equal(labels, y)
    torch.testing.assert_close(maps.float().mean((2, 3)), x, rtol=0.01, atol=0.002)
    with pytest.raises(UserError, match="could not be read"):
        extract_features(backbone, data, DATA, batch_size=16)


def test_probe_and_knn_write_what_they_print(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = run_probe(ProbeConfig(run=str(run), workers=0)) + run_knn(KnnConfig(run=str(run), workers=0))
    printed = capsys.readouterr().out
    entries = json.loads((run / "evaluation.json").read_text())["results"]
    assert entries == [dataclasses.asdict(result) for result in results]
    assert [(e["metric"], e["weights"]) for e in entries] == [
        ("linear", "pretrained"),
        ("linear", "random_init"),
        ("knn", "pretrained"),
        ("knn", "random_init"),
    ]
    for entry in entries:
        assert entry["protocol"] in printed
        assert f"{100 * entry['accuracy']:.1f} %" in printed
        assert (entry["train_size"], entry["val_size"], entry["data"]) == (80, 40, "shapes")
    # The report compares results of one protocol.
    assert entries[0]["protocol"] == entries[1]["protocol"]
    assert [entry["step"] for entry in entries] == [7, 0, 7, 0]
    probe, classes = load_probe(run / "probe.safetensors")
    assert probe.weight.shape == (10, 24)
    assert classes == open_split(DATA, "val").classes


@pytest.mark.parametrize("head", ["attentive", "block"])
def test_another_head_stands_beside_the_linear_one(run: Path, head: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", f"run={run}", "workers=0"]) == 0
    probe = (run / "probe.safetensors").read_bytes()
    linear = read_results(run / "evaluation.json")
    capsys.readouterr()
    assert main(["probe", f"run={run}", "workers=0", f"head={head}", "epochs=8", "held_out=0.2"]) == 0
    printed = capsys.readouterr().out
    results = read_results(run / "evaluation.json")
    assert results[:2] == linear
    assert [(entry["metric"], entry["weights"]) for entry in results[2:]] == [
        (head, "pretrained"),
        (head, "random_init"),
    ]
    for entry in results[2:]:
        assert "selected on 20 % of train in 2 epochs, retrained on all of it, 8 epochs" in entry["protocol"]
        assert "frozen feature maps (24 x 4 x 4) at 32 px" in entry["protocol"]
        assert entry["protocol"] in printed
    assert results[2]["protocol"] == results[3]["protocol"]
    assert (run / "probe.safetensors").read_bytes() == probe, "attribution goes on with the linear probe"
    assert sorted(path.name for path in run.iterdir() if "probe" in path.name) == ["probe.safetensors"]


def test_maps_that_memory_cannot_hold_are_refused_before_they_are_extracted(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features, "MOST_BYTES", 2 * 80 * 24 * 4 * 4)
    run_probe(ProbeConfig(run=str(run), workers=0, head="attentive", epochs=1, random_init=False))
    monkeypatch.setattr(features, "MOST_BYTES", 2 * 80 * 24 * 4 * 4 - 1)
    with pytest.raises(UserError, match=r"80 images, 24 x 4 x 4 each.*data\.train_size.*head=linear"):
        run_probe(ProbeConfig(run=str(run), workers=0, head="attentive", epochs=1, random_init=False))


def test_the_twin_is_another_network_and_depends_on_the_seed(run: Path) -> None:
    opened = source.open_source(KnnConfig(run=str(run)))
    before = torch.random.get_rng_state()
    prints = {source.fingerprint(model) for model in (opened.backbone, opened.twin(0), opened.twin(1), opened.twin(0))}
    assert len(prints) == 3
    assert torch.equal(before, torch.random.get_rng_state())


def test_running_again_replaces_and_another_seed_adds(run: Path) -> None:
    for seed in (0, 0, 1):
        run_knn(KnnConfig(run=str(run), workers=0, random_init=False, seed=seed))
    assert [entry["seed"] for entry in read_results(run / "evaluation.json")] == [0, 1]


def test_a_held_out_part_of_train_does_not_replace_val(run: Path) -> None:
    for held_out in (0.0, 0.25):
        run_knn(
            KnnConfig(
                run=str(run), data=dataclasses.replace(DATA, held_out=held_out), workers=0, random_init=False, k=5
            )
        )
    assert [entry["split"] for entry in read_results(run / "evaluation.json")] == ["val", "held-out"]


@pytest.mark.parametrize(
    ("words", "bar"),
    [
        (["knn"], "neighbours"),
        (["probe"], "logistic regression"),
        (["probe", "solver=sgd", "epochs=2"], "SGD"),
        (["probe", "shots=1"], "draws"),
        (["segment", "method=knn"], "neighbours"),
        (["health", "images=4"], "features"),
        (["health", "images=4"], "receptive field"),
    ],
)
def test_whoever_waits_sees_how_far_it_is(words: list[str], bar: str, run: Path, monkeypatch) -> None:
    shown = []
    real = tqdm.__init__

    def start(self: tqdm, *arguments: object, **settings: object) -> None:
        if settings.get("disable") is None:  # where there is a terminal
            shown.append(settings["desc"])
        real(self, *arguments, **settings)

    monkeypatch.setattr(tqdm, "__init__", start)
    assert main([words[0], f"run={run}", "workers=0", "random_init=false", *words[1:]]) == 0
    assert bar in shown


def test_a_damaged_result_file_is_not_overwritten(tmp_path: Path) -> None:
    file = tmp_path / "evaluation.json"
    file.write_text('{"results": [')
    values = {"metric": "knn", "weights": "pretrained", "accuracy": 0.5, "seconds": 1.0, "commit": None}
    values |= dict.fromkeys(("protocol", "data", "split", "backbone", "source", "hardware"), "")
    result = Result(**values, train_size=1, val_size=1, seed=0, step=0)
    with pytest.raises(UserError, match="move it away"):
        append_results(file, [result])
    assert file.read_text() == '{"results": ['


def test_bad_input_names_the_fix(run: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        run_knn(KnnConfig(run=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no images of its own"):
        run_knn(KnnConfig(run="timm:resnet10t?random"))
    with pytest.raises(UserError, match="output=FOLDER"):
        run_knn(KnnConfig(run="timm:resnet10t?random", data=DATA))
    with pytest.raises(UserError, match="unknown accelerator"):
        run_knn(KnnConfig(run=str(run), accelerator="abacus"))
    with pytest.raises(UserError, match="k=81"):
        run_knn(KnnConfig(run=str(run), workers=0, k=81))
    with pytest.raises(UserError, match="choose one of linear, attentive, block"):
        run_probe(ProbeConfig(run=str(run), head="convolution"))
    assert not (run / "evaluation.json").exists()


def test_random_weights_are_those_of_the_seed() -> None:
    """Else no command would find what another has measured; and they are the twin of the published ones."""
    torch.manual_seed(9)
    expected = torch.rand(1)
    torch.manual_seed(9)
    first, again, other = (
        source.open_source(KnnConfig(run="timm:test_vit?random", data=DATA, output="x", seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(torch.rand(1), expected), "the global generator stays as it was"
    assert source.fingerprint(first.backbone) == source.fingerprint(again.backbone) == source.fingerprint(first.twin(1))
    assert source.fingerprint(first.backbone) != source.fingerprint(other.backbone)
