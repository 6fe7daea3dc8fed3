"""The line and the bar say the same."""

import sys
from collections.abc import Callable

import pytest

from heatssl.config import PretrainConfig
from heatssl.training import pretrain
from heatssl.training.progress import duration, figures

MakeConfig = Callable[..., PretrainConfig]


def test_figures_leave_out_what_was_not_measured() -> None:
    assert figures({"train/loss": 0.5}, 61) == "loss 0.5000  ETA 1:01"
    latest = {
        "train/loss": 0.5,
        "knn/accuracy": 0.25,
        "train/images_per_second": 1234.5,
        "train/data_wait": 0.07,
    }
    assert figures(latest, 3723) == "loss 0.5000  kNN 25.0%  1234 img/s  data wait 7%  ETA 1:02:03"


def test_duration_rounds_up_to_whole_minutes() -> None:
    assert duration(59.7) == "1:00"
    assert duration(3599.9) == "1:00:00"


def test_terminal_gets_one_bar(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    pretrain(make_config(steps=6, knn_every=0))
    shown = capsys.readouterr()
    assert "step 3/6" not in shown.out
    assert "6/6, loss" in shown.err
    assert "img/s" in shown.err
    assert "ETA" in shown.err
    assert shown.err.rstrip("\n").count("\n") == 0
