"""What was to be expected of a run: only beside the settings that were recorded, and said where one looks."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from heatssl import cli
from heatssl import expected as module
from heatssl.composition import compose
from heatssl.config_folder import config_folder, options
from heatssl.expected import KEYS, Expected, expected_of, settings_of
from heatssl.report import write_report

ROOT = Path(__file__).resolve().parent.parent
BACKBONE = "backbone_arguments={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 2}"
SMALL = [BACKBONE, "data.image_size=32", "data.train_size=16", "data.val_size=10", "data.workers=0"]
SMALL += ["trainer.steps=4", "trainer.batch_size=4", "trainer.log_every=1", "trainer.knn_every=0"]
SMALL += ["trainer.accelerator=cpu"]


def test_between_recorded_steps_the_band_is_interpolated() -> None:
    expected = Expected(3, {"train/loss": [(100, 1.0, 2.0), (200, 0.0, 1.5)]})
    assert expected.at("train/loss", 100) == (1.0, 2.0)
    assert expected.at("train/loss", 150) == (0.5, 1.75)
    assert expected.at("train/loss", 99) is None
    assert expected.at("train/loss", 201) is None
    assert expected.at("knn/accuracy", 150) is None


def record(folder: Path, overrides: list[str], loss: list[list[float]]) -> None:
    """Bands of a run called ``tiny``."""
    recorded = {"runs": 3, "settings": settings_of(compose("pretrain", overrides)), "bands": {"train/loss": loss}}
    (folder / "recorded_runs").mkdir()
    (folder / "recorded_runs" / "tiny.yaml").write_text(yaml.safe_dump(recorded))


@pytest.fixture
def recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record(tmp_path, SMALL, [[1, 50.0, 60.0], [3, 0.0, 90.0], [4, 0.0, 0.1]])
    monkeypatch.setattr(module, "config_folder", lambda: tmp_path)


@pytest.mark.usefixtures("recorded")
@pytest.mark.parametrize(
    ("changed", "same"),
    [
        (["seed=7", "output=elsewhere", "trainer.log_every=3", "data.workers=1"], True),
        (["trainer.steps=5"], False),
        (["objective.visible_ratio=0.5"], False),
        (["objective=finola"], False),
        (["trainer.knn_val_size=3"], False),  # kNN in another bank is another figure
        (["data.crop_scale=[0.5,1.0]"], False),
    ],
)
def test_only_the_recorded_settings_have_bands(changed: list[str], same: bool) -> None:
    found = expected_of(compose("pretrain", [*SMALL, "expected=tiny", *changed]))
    assert (found is not None) == same


@pytest.mark.usefixtures("recorded")
def test_a_run_is_told_how_it_stands_and_its_report_shows_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert cli.main(["pretrain", *SMALL, "expected=tiny", f"output={run}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "in brackets: what 3 recorded runs of tiny lead one to expect at that step" in lines
    shown = {line.split("  ")[0]: line for line in lines if line.startswith("step ")}
    assert "(50.0000 to 60.0000, LOW)" in shown["step 1/4"]
    assert "(0.0000 to 90.0000)" in shown["step 3/4"]
    assert "(0.0000 to 0.1000, HIGH)" in shown["step 4/4"]
    page = write_report(run).read_text()
    assert 'class="band"' in page
    assert "shaded: recorded runs of this recipe" in page
    other = tmp_path / "other"
    assert cli.main(["pretrain", *SMALL, "trainer.steps=2", "expected=tiny", f"output={other}"]) == 0
    assert "these settings are not those of the recorded runs of tiny" in capsys.readouterr().out
    assert 'class="band"' not in write_report(other).read_text()


def test_every_recipe_fits_the_runs_it_names() -> None:
    """A recipe that was changed without recording it again would show no bands, or false ones."""
    named = {}
    for recipe in options("recipe"):
        settings = yaml.safe_load((config_folder() / "recipe" / f"{recipe}.yaml").read_text())
        if settings.get("expected"):
            named[recipe] = settings["expected"]
            root = ["data.root=/data"] if settings["defaults"][0] != {"override /data": "shapes"} else []
            found = expected_of(compose("pretrain", [f"recipe={recipe}", *root]))
            assert found is not None, f"record {recipe} again: python tools/expected.py {recipe} RUN RUN RUN"
            assert set(found.bands) == set(KEYS)
    assert "demo" in named


def test_bands_are_made_from_runs_that_differ_in_their_seed(tmp_path: Path) -> None:
    from heatssl.config_file import save_config

    configs = tmp_path / "configs"
    configs.mkdir()
    for seed, loss in enumerate((1.0, 2.0, 3.0)):
        config = compose("pretrain", [*SMALL, f"seed={seed}"])
        save_config(config, tmp_path / str(seed) / "config.yaml")
        rows = [{"step": 2, "train/loss": loss}, {"step": 4, "train/loss": 1.0}, {"step": 5 + seed, "train/loss": 1.0}]
        (tmp_path / str(seed) / "metrics.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import expected as tool
    finally:
        sys.path.pop(0)
    metrics = [
        [json.loads(line) for line in (tmp_path / str(s) / "metrics.jsonl").read_text().splitlines()] for s in range(3)
    ]
    assert tool.band(metrics, "train/loss") == [[2, 0.0, 5.0], [4, 0.95, 1.05]]
    save_config(compose("pretrain", [*SMALL, "trainer.steps=9"]), tmp_path / "2" / "config.yaml")
    folders = [str(tmp_path / str(seed)) for seed in range(3)]
    refused = subprocess.run(
        [sys.executable, ROOT / "tools/expected.py", "x", *folders], check=False, capture_output=True, text=True
    )
    assert refused.returncode == 1
    assert "other settings" in refused.stderr
