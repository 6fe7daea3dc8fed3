"""The commands' numbers end up in papers: right weights, right split, right entry, nothing stale."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from heatssl.backbones import create_backbone
from heatssl.config import DataConfig, KnnConfig, PretrainConfig, ProbeConfig
from heatssl.config_file import save_config
from heatssl.data import Subset, open_split
from heatssl.errors import UserError
from heatssl.evaluation import extract_features, load_probe, run_knn, run_probe, source
from heatssl.evaluation.results import Result, append_results, read_results
from heatssl.export import BackboneInfo, save_backbone

ARGUMENTS = {"depth": 1, "embed_dim": 24, "num_heads": 2, "patch_size": 8}
DATA = DataConfig(image_size=32, train_size=80, val_size=40, workers=0)


def write_run(folder: Path, seed: int = 3) -> Path:
    """A run folder whose backbone was never trained."""
    folder.mkdir(exist_ok=True)
    torch.manual_seed(seed)
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS)
    save_backbone(folder, backbone, BackboneInfo("vit_tiny_patch16_224", 32, ARGUMENTS, DATA.mean, DATA.std, step=7))
    save_config(PretrainConfig(data=DATA, backbone_arguments=dict(ARGUMENTS)), folder / "config.yaml")
    return folder


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """An untrained run."""
    return write_run(tmp_path / "run")


def test_features_are_in_order_and_do_not_depend_on_the_batch(run: Path) -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 32, **ARGUMENTS).train()
    data = open_split(DATA, "val")
    whole, labels = extract_features(backbone, data, DATA, batch_size=40)
    parts, _ = extract_features(backbone, data, DATA, batch_size=7)
    assert whole.shape == (40, 24)
    assert labels.tolist() == data.labels
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-5)
    assert backbone.training


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


def test_features_are_extracted_once_but_never_stale(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = source.extract_features
    monkeypatch.setattr(source, "extract_features", lambda *a, **k: calls.append(1) or real(*a, **k))
    monkeypatch.setattr(source, "_features", source.OrderedDict())
    run_probe(ProbeConfig(run=str(run), workers=0))
    assert len(calls) == 4
    run_knn(KnnConfig(run=str(run), workers=0))
    assert len(calls) == 4
    write_run(run, seed=4)
    run_knn(KnnConfig(run=str(run), workers=0))
    assert len(calls) == 6, "new weights, same twin"
    run_knn(KnnConfig(run=str(run), workers=0, random_init=False, data=dataclasses.replace(DATA, val_size=30)))
    assert len(calls) == 8


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
    assert not (run / "evaluation.json").exists()
