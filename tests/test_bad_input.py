"""Bad input through the real command line: exit code 2, one line that names the fix, nothing written or lost."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from heatssl.backbones import create_backbone
from heatssl.cli import main
from heatssl.config import KnnConfig
from heatssl.evaluation.source import open_source
from heatssl.export import load_backbone

TINY = [
    "backbone=vit_tiny_patch16_224",
    "backbone_arguments={patch_size: 8, depth: 1, embed_dim: 24, num_heads: 3}",
    "data.image_size=32",
    "data.workers=0",
    "trainer.steps=2",
    "trainer.batch_size=4",
    "trainer.knn_every=0",
    "trainer.accelerator=cpu",
    "optimizer.warmup_steps=1",
]


def write_images(root: Path, classes: list[str], splits: tuple[str, ...] = ("train", "val"), count: int = 4) -> Path:
    for split in splits:
        for number, name in enumerate(classes):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (40, 36), (40 * number, 10 * i, 99)).save(folder / f"{i}.png")
    return root


def pretrain(root: Path | None, output: Path, *overrides: str) -> int:
    data = ["data=folder", f"data.root={root}"] if root else ["data=shapes", "data.train_size=20", "data.val_size=10"]
    return main(["pretrain", *data, *TINY, f"output={output}", *overrides])


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images", ["cat", "dog"])


def missing_folder(images: Path) -> list[str]:
    shutil.rmtree(images)
    return []


def empty_folder(images: Path) -> list[str]:
    shutil.rmtree(images)
    images.mkdir()
    return []


def loose_val(images: Path) -> list[str]:
    for file in (images / "val").rglob("*.png"):
        file.rename(images / "val" / f"{file.parent.name}_{file.name}")
    for name in ("cat", "dog"):
        (images / "val" / name).rmdir()
    return []


def class_only_in_val(images: Path) -> list[str]:
    write_images(images, ["emu"], splits=("val",))
    return []


CASES = {
    "missing folder": (missing_folder, "data.root"),
    "empty folder": (empty_folder, "train"),
    "val with loose files": (loose_val, "val"),
    "class in val that train lacks": (class_only_in_val, "emu"),
    "unknown key": (lambda _: ["trainer.step=3"], "trainer.steps"),
    "image smaller than a patch": (lambda _: ["data.image_size=4"], "smaller than one patch of 8"),
    "grid that cannot be quartered": (
        lambda _: ["data.image_size=24"],
        "cannot be quartered: set data.image_size=16 or 32",
    ),
    "fraction of a patch": (lambda _: ["data.image_size=36"], "32 or 40"),
    "unknown backbone": (lambda _: ["backbone=vit_tiny_patch16_244"], "vit_tiny_patch16_224"),
    "weights to start from that are not there": (
        lambda _: ["+backbone_arguments.checkpoint_path=nofile.pth"],
        "nofile.pth",
    ),
    "no output": (lambda _: ["output="], "output= is empty"),
    "output below a file": (
        lambda images: [f"output={images / 'train' / 'cat' / '0.png' / 'run'}"],
        "0.png is a file: choose another output=FOLDER",
    ),
    "a prior around one patch": (lambda _: ["objective=heat_jepa", "prior=laplace"], "two visible patches or more"),
    "too few classes": (lambda _: ["data.expected_classes=10"], "10"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_fix_is_named_and_nothing_is_written(
    case: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, fix = CASES[case]
    assert pretrain(images, tmp_path / "run", *spoil(images)) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("heatssl: error: ")
    assert "\n" not in error
    assert fix in error
    assert not (tmp_path / "run").exists()


def test_another_run_and_another_architecture_are_refused_and_left_alone(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert pretrain(images, run) == 0
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for override in ("seed=1", "backbone_arguments.embed_dim=48"):
        capsys.readouterr()
        assert pretrain(images, run, override) == 2
        error = capsys.readouterr().err.strip()
        assert "\n" not in error
        assert override.split("=", 1)[0] in error
        assert "output=" in error
    # The same settings beside weights of another architecture: only the checkpoint itself can tell.
    other = tmp_path / "other"
    assert pretrain(images, other, "backbone_arguments.embed_dim=48", "trainer.steps=3") == 0
    capsys.readouterr()
    wide = tmp_path / "wide"
    assert pretrain(images, wide, "trainer.steps=3") == 0
    shutil.copy(other / "checkpoints" / "last.ckpt", wide / "checkpoints" / "last.ckpt")
    capsys.readouterr()
    assert pretrain(images, wide, "trainer.steps=3") == 2
    error = capsys.readouterr().err
    assert "embed_dim=48" in error
    assert "embed_dim=24" in error
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}


@pytest.mark.parametrize("spoil", [loose_val, class_only_in_val])
def test_a_val_that_is_held_out_of_train_leaves_the_other_unread(spoil, images: Path, tmp_path: Path) -> None:
    spoil(images)
    assert pretrain(images, tmp_path / "run", "data.held_out=0.5") == 0


def test_a_run_does_not_go_on_with_other_images(
    images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would have other losses, and nothing would say so."""
    from heatssl.training.stop import StopRequest

    run = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(StopRequest, "agreed", lambda *_: True)
        with pytest.raises(SystemExit):  # after its first step
            pretrain(images, run)
    (images / "train" / "cat" / "0.png").rename(images / "moved.png")
    capsys.readouterr()
    assert pretrain(images, run) == 2
    error = capsys.readouterr().err
    assert "was made of 8 images" in error
    assert "there are 7 images" in error
    (images / "moved.png").rename(images / "train" / "cat" / "0.png")
    assert pretrain(images, run) == 0
    (images / "train" / "cat" / "0.png").unlink()
    assert pretrain(images, run) == 0, "it is finished"


def test_random_weights_beside_a_backbone_that_began_with_others(images: Path, tmp_path: Path) -> None:
    """A twin that loads the same file would be no twin; and the run must be read when the file is gone."""
    weights = tmp_path / "start.pth"
    size = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
    torch.save(create_backbone("vit_tiny_patch16_224", 32, **size).state_dict(), weights)
    run, still = tmp_path / "run", ["optimizer.learning_rate=1e-12", "optimizer.final_learning_rate=0"]
    assert pretrain(images, run, f"+backbone_arguments.checkpoint_path={weights}", *still) == 0
    weights.rename(tmp_path / "elsewhere.pth")
    trained, info = load_backbone(run)
    source = open_source(KnnConfig(run=str(run), workers=0))
    twin, began = source.twin(seed=0), torch.load(tmp_path / "elsewhere.pth")
    assert torch.allclose(trained.patch_embed.proj.weight, began["patch_embed.proj.weight"])
    assert not torch.allclose(twin.patch_embed.proj.weight, began["patch_embed.proj.weight"])
    assert "checkpoint_path" not in info.arguments
    assert "checkpoint_path" not in (run / "backbone.json").read_text()


def test_a_run_without_its_metrics_is_still_finished(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert pretrain(images, run) == 0
    for name in ("metrics.jsonl", "pictures.npz"):
        (run / name).unlink()
    assert pretrain(images, run) == 0


def test_who_reads_no_further_is_not_shown_a_traceback() -> None:
    command = f"{sys.executable} -m heatssl.cli models | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout
    assert "Traceback" not in done.stderr
    assert "BrokenPipe" not in done.stderr
