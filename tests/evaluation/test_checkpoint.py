"""What training has cost is not lost, and what is lost is said."""

import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from heatssl.cli import main
from heatssl.evaluation.checkpoint import Checkpoint
from heatssl.evaluation.results import read_results


def state(path: Path) -> tuple[Checkpoint, torch.nn.Linear]:
    """A checkpoint of a model, and the model."""
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return Checkpoint(path, "key", {"model": model, "optimizer": optimizer}), model


@pytest.mark.parametrize("damage", ["half", "empty", "text", "other", "part"])
def test_a_damaged_file_is_told_of_in_one_line_and_counts_as_none(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    path = tmp_path / "state.ckpt"
    state(path)[0].save(7)
    whole = path.read_bytes()
    if damage == "part":  # the model fits, the optimiser does not: nothing may be taken from it
        torch.save(torch.load(path) | {"optimizer": {"state": {}, "param_groups": []}}, path)
    elif damage == "other":
        torch.save([1, 2], path)
    else:
        path.write_bytes({"half": whole[: len(whole) // 2], "empty": b"", "text": b"x" * 99}[damage])
    kept, model = state(path)
    before = model.weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        assert kept.load() == 0
    assert torch.equal(model.weight, before)
    (record,) = caplog.records
    assert "state.ckpt is damaged or cannot be read" in record.message
    assert record.message.count("\n") == 0
    kept.save(3)
    assert state(path)[0].load() == 3


@pytest.mark.parametrize(
    "command",
    [
        ["detect", "epochs=2", "width=32", "scales=[1]", "flip=false"],
        ["finetune", "epochs=2", "random_init=true", "drop_path=0"],
        ["probe", "protocol=mae", "epochs=2"],
    ],
)
def test_who_stops_the_twin_does_not_lose_the_weights(
    write_run: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: list[str]
) -> None:
    words = [*command, "workers=0", "batch_size=16", "data=shapes", "data.train_size=32", "data.val_size=20"]
    run = {name: str(write_run(tmp_path / name)) for name in ("whole", "parts")}
    assert main([*words, f"run={run['whole']}"]) == 0
    trained: list[str] = []
    real = Checkpoint.save

    def save(self: Checkpoint, step: int) -> None:
        real(self, step)
        trained.append(self.path.name)
        if stopped and "random_init" in self.path.name:
            raise KeyboardInterrupt

    monkeypatch.setattr(Checkpoint, "save", save)
    stopped = True
    assert main([*words, f"run={run['parts']}"]) == 130
    trained.clear()
    stopped = False
    assert main([*words, f"run={run['parts']}"]) == 0
    assert len(trained) == 1, "the last epoch of the twin"
    assert "random_init" in trained[0]
    assert not list((tmp_path / "parts").glob("*.ckpt"))
    whole, parts = (read_results(Path(folder) / "evaluation.json") for folder in run.values())
    assert [entry["accuracy"] for entry in parts] == [entry["accuracy"] for entry in whole]
    assert [entry["key"] for entry in parts] == [entry["key"] for entry in whole]
