"""Two processes with half a batch each have the loss and the gradient of one with the whole batch."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from heatssl.objectives.heat_jepa import contrast_of_parts
from heatssl.objectives.isotropy import sigreg
from heatssl.objectives.lejepa import prediction_loss
from heatssl.objectives.processes import gather, sum_over_processes, world_size
from heatssl.objectives.projector import BatchNorm, embedding_head
from heatssl.objectives.simclr import nt_xent

LOSSES = {
    "nt_xent": lambda embeddings: nt_xent(*embeddings, 0.2),
    "contrast_of_parts": lambda embeddings: contrast_of_parts(embeddings, 0.2),
    "sigreg": lambda embeddings: sigreg(embeddings, 16),
    "prediction_loss": lambda embeddings: prediction_loss(embeddings, 1),
}

# The second process has fewer images than the first: unreadable ones are left out of a batch.
SCRIPT = """
import sys
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from heatssl.objectives.heat_jepa import contrast_of_parts
from heatssl.objectives.isotropy import sigreg
from heatssl.objectives.lejepa import prediction_loss
from heatssl.objectives.projector import embedding_head
from heatssl.objectives.simclr import nt_xent

LOSSES = {
    "nt_xent": lambda embeddings: nt_xent(*embeddings, 0.2),
    "contrast_of_parts": lambda embeddings: contrast_of_parts(embeddings, 0.2),
    "sigreg": lambda embeddings: sigreg(embeddings, 16),
    "prediction_loss": lambda embeddings: prediction_loss(embeddings, 1),
}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    given = torch.load(f"{folder}/given.pt")
    part = slice(0, 5) if rank == 0 else slice(5, 8)
    found = {}
    for name, measure in LOSSES.items():
        head = embedding_head([6, 12, 4]).double() if name == "sigreg" else embedding_head([6, 12, 4])
        head.load_state_dict(given["head"])
        features = given["features"][:, part]
        embeddings = head(features.flatten(0, 1).to(head[0].weight.dtype)).unflatten(0, (2, -1))
        torch.manual_seed(rank + 7)  # as in training, where each process has random numbers of its own
        loss = measure(embeddings)
        loss.backward()
        found[name] = loss.detach(), [p.grad for p in head.parameters()], dict(head.named_buffers())
    torch.save(found, f"{folder}/found{rank}.pt")


if __name__ == "__main__":
    # Forked before anything ran backwards, so that torch is imported once.
    multiprocessing.start_processes(work, args=(sys.argv[1],), nprocs=2, start_method="fork")
"""


@pytest.mark.slow
def test_two_processes_make_one_batch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    head = embedding_head([6, 12, 4])
    features = torch.randn(2, 8, 6)
    torch.save({"features": features, "head": head.state_dict()}, tmp_path / "given.pt")
    (tmp_path / "two.py").write_text(SCRIPT)
    done = subprocess.run([sys.executable, tmp_path / "two.py", tmp_path], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    one, other = (torch.load(tmp_path / f"found{rank}.pt") for rank in (0, 1))
    start = head.state_dict()
    for name, measure in LOSSES.items():
        kind = torch.float64 if name == "sigreg" else torch.float32
        whole = embedding_head([6, 12, 4]).to(kind)
        whole.load_state_dict(start)
        embeddings = whole(features.to(kind).flatten(0, 1)).unflatten(0, (2, -1))
        torch.manual_seed(7)  # the first process's directions count
        loss = measure(embeddings)
        loss.backward()
        (loss_one, gradients_one, buffers_one), (loss_other, gradients_other, buffers_other) = one[name], other[name]
        torch.testing.assert_close((loss_one + loss_other) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
        for parameter, first, second in zip(whole.parameters(), gradients_one, gradients_other, strict=True):
            # What DDP makes of them.
            torch.testing.assert_close((first + second) / 2, parameter.grad, rtol=1e-4, atol=1e-6)
        for key, value in whole.named_buffers():
            torch.testing.assert_close(buffers_one[key], value)
            torch.testing.assert_close(buffers_other[key], value)


def test_a_single_process_needs_no_group() -> None:
    rows = torch.randn(3, 2)
    assert world_size() == 1
    assert sum_over_processes(rows) is rows
    assert gather(rows) == (rows, 0)


def test_batch_norm_of_one_process_is_torchs() -> None:
    torch.manual_seed(0)
    ours, theirs, rows = BatchNorm(4), torch.nn.BatchNorm1d(4), torch.randn(9, 4)
    assert torch.equal(ours(rows), theirs(rows))
    assert torch.equal(ours.eval()(rows), theirs.eval()(rows))
