"""What may not be read or written is named in one line; run as root, the commands work as nobody."""

import contextlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from heatssl.cli import main
from heatssl.config import DataConfig
from heatssl.data import eval_loader, open_split

NOBODY = 65534
SETTINGS = [
    "data.image_size=32", "data.workers=0", "trainer.steps=2", "trainer.batch_size=4", "trainer.knn_every=0",
    "trainer.accelerator=cpu", "optimizer.warmup_steps=1", "backbone=vit_tiny_patch16_224",
    "backbone_arguments={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 3}",
]  # fmt: skip


@pytest.fixture(scope="module")
def place() -> Iterator[Path]:
    """Images, a tar of nothing and a run, in a folder that nobody may enter: pytest's own are closed to others."""
    place = Path(tempfile.mkdtemp())
    place.chmod(0o755)
    for split in ("train", "val"):
        for i in range(8):
            path = place / "images" / split / "ab"[i % 2] / "deep" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (30 * i, 20, 90)).save(path)
    (place / "images.tar").write_bytes(b"")
    assert pretrain(place) == 0
    (place / "closed").mkdir(mode=0o555)
    (place / "open").mkdir()
    (place / "open").chmod(0o777)
    yield place
    shutil.rmtree(place)


def pretrain(place: Path, *settings: str) -> int:
    data = ["data=folder", f"data.root={place / 'images'}"]
    return main(["pretrain", *data, *SETTINGS, f"output={place / 'run'}", *settings])


@contextlib.contextmanager
def forbidden(path: Path, mode: int = 0) -> Iterator[None]:
    """Take the permissions of a file or folder away."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        yield
    finally:
        path.chmod(before)


def as_nobody(work: Callable[[], int], told: Path) -> tuple[int, str]:
    """Exit code and standard error of ``work`` in a forked process: root may read everything."""
    with told.open("w") as file:
        child = os.fork()
        if child == 0:
            code = 99
            torch.set_num_threads(1)  # OpenMP's other threads are not in a fork, which would wait for them for ever
            with contextlib.suppress(BaseException), contextlib.redirect_stderr(file):
                if os.geteuid() == 0:
                    os.setuid(NOBODY)
                code = work()
                file.flush()
            os._exit(code)
        status = os.waitpid(child, 0)[1]
    return os.waitstatus_to_exitcode(status), told.read_text()


CASES: dict[str, tuple[str, Callable[[Path], int]]] = {
    "data folder": ("images", lambda place: pretrain(place, f"output={place}/open/new")),
    "split": ("images/train", lambda place: pretrain(place, f"output={place}/open/new")),
    "class": (
        "images/val/a",
        lambda place: main(["knn", f"run={place}/run", "workers=0", f"output={place}/open/new"]),
    ),
    "folder below a class": ("images/train/a/deep", lambda place: pretrain(place, f"output={place}/open/new")),
    "tar file": (
        "images.tar",
        lambda place: pretrain(place, "data=tar", f"data.root={place}/images.tar", f"output={place}/open/new"),
    ),
    "output": ("closed", lambda place: pretrain(place, f"output={place}/closed/new")),
    "output of an evaluation": (
        "closed",
        lambda place: main(["knn", f"run={place}/run", "workers=0", f"output={place}/closed/new"]),
    ),
    "run to go on with": ("run", pretrain),
    "checkpoint": ("run/checkpoints/last.ckpt", pretrain),
    "run to evaluate": ("run", lambda place: main(["probe", f"run={place}/run"])),
    "weights": ("run/backbone.safetensors", lambda place: main(["attribute", f"run={place}/run"])),
    "run to report": ("run", lambda place: main(["report", f"run={place}/run"])),
}


@pytest.mark.parametrize("case", CASES)
def test_what_may_not_be_opened_is_named_in_one_line(case: str, place: Path, tmp_path: Path) -> None:
    name, work = CASES[case]
    with forbidden(place / name, 0o555 if case.startswith("output") else 0):
        code, told = as_nobody(lambda: work(place), tmp_path / "told")
    assert (code, told.count("\n")) == (2, 1), told
    assert told.startswith("heatssl: error: ")
    assert str(place / name) in told
    assert "permission" in told.lower()
    assert "name another place" in told or "choose another output" in told
    assert list((place / "open").iterdir()) == []


def test_single_images_that_may_not_be_read_count_as_bad_files(place: Path, tmp_path: Path) -> None:
    config = DataConfig(name="folder", root=str(place / "images"), image_size=32, workers=0)

    def bad_files() -> int:
        (batch,) = eval_loader(open_split(config, "val"), config, batch_size=8)
        assert ["Permission" in reason for reason in batch.bad] == [True]
        return len(batch.images)

    with forbidden(place / "images/val/a/deep/0.png"):
        assert as_nobody(bad_files, tmp_path / "told")[0] == 7


def test_no_image_that_may_be_read_is_a_mistake_too(place: Path, tmp_path: Path) -> None:
    with contextlib.ExitStack() as closed:
        for path in (place / "images/train").rglob("*.png"):
            closed.enter_context(forbidden(path))
        settings = [f"output={place}/open/new", "trainer.knn_every=1"]
        code, told = as_nobody(lambda: pretrain(place, *settings), tmp_path / "told")
    shutil.rmtree(place / "open/new", ignore_errors=True)
    assert code == 2
    assert "can be read" in told.splitlines()[-1]
