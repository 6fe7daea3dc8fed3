"""What training has cost is not lost, and what is lost is said."""

import logging
from pathlib import Path

import pytest
import torch

from heatssl.evaluation.checkpoint import Checkpoint


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
