"""`heatssl demo`, the first thing that a new user runs: a table of numbers and the path of a report."""

import json
import re
from pathlib import Path

import pytest

from heatssl.demo import run_demo, summary
from heatssl.errors import UserError

TINY = [
    *("data.train_size=120", "data.val_size=40", "data.image_size=32", "data.workers=0"),
    *("backbone_arguments.embed_dim=32", "backbone_arguments.depth=1", "backbone_arguments.num_heads=2"),
    *("trainer.steps=4", "trainer.batch_size=16", "trainer.log_every=2", "trainer.checkpoint_every=4"),
    *(
        "trainer.knn_every=0",
        "trainer.accelerator=cpu",
        "optimizer.warmup_steps=1",
        "objective.painter_width=16",
    ),
]


def entry(metric: str, weights: str, accuracy: float, protocol: str = "plain") -> dict[str, object]:
    return {"metric": metric, "weights": weights, "accuracy": accuracy, "protocol": protocol}


def test_the_summary_is_an_aligned_table_of_the_newest_numbers(tmp_path: Path) -> None:
    results = [
        entry("linear", "pretrained", 0.1, "outdated"),
        entry("linear", "random_init", 0.318),
        entry("linear", "pretrained", 0.521),
        entry("knn", "pretrained", 0.417, "k=20"),
    ]
    (tmp_path / "evaluation.json").write_text(json.dumps({"results": results}))
    lines = summary(tmp_path, {"pretrain": 93.0, "kNN": 2.0}).replace("\u00a0", " ").splitlines()
    assert lines[0].split() == ["pretrained", "random", "init", "gain"]
    assert lines[1].split() == ["linear", "probe", "52.1", "%", "31.8", "%", "+20.3", "points"]
    assert lines[2].split() == ["kNN", "41.7", "%", "-", "-"]
    assert len({len(line) for line in lines[:3]}) == 1
    assert "linear probe: plain" in lines
    assert "kNN: k=20" in lines
    assert lines[-1] == "time    1 min 35 s = pretrain 1 min 33 s + kNN 2 s"


def test_a_misspelt_setting_stops_the_demo_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"trainer\.steps"):
        run_demo(["trainer.stepz=3"])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_miniature_demo_ends_with_numbers_and_a_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    report = run_demo(TINY)
    printed = capsys.readouterr().out.replace("\u00a0", " ")
    assert report == tmp_path / "runs/demo/report.html"
    assert printed.rstrip().endswith(str(report))
    for name in ("linear probe", "kNN"):
        assert re.search(rf"^{name} +\d+\.\d % +\d+\.\d % +[+\u2212]\d+\.\d points$", printed, flags=re.MULTILINE)
        assert re.search(rf"^{name}: \w+", printed, flags=re.MULTILINE)
    page = report.read_text(encoding="utf-8")
    assert 'class="remark"' not in page  # nothing is missing
    maps = json.loads((tmp_path / "runs/demo/attribution/attribution.json").read_text())["maps"]
    assert {entry["method"] for entry in maps} == {"gradcam", "integrated_gradients", "heat_flow"}
    assert len({entry["target"].partition(":")[0] for entry in maps}) >= 2

    weights = (tmp_path / "runs/demo/backbone.safetensors").read_bytes()
    assert run_demo(TINY) == report  # trains nothing, measures again
    assert (tmp_path / "runs/demo/backbone.safetensors").read_bytes() == weights
    again = json.loads((tmp_path / "runs/demo/attribution/attribution.json").read_text())["maps"]
    assert len(again) == len(maps)
