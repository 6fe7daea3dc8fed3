"""A full disk costs the newest checkpoint, never the one before."""

import errno
import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from heatssl.config import PretrainConfig
from heatssl.errors import UserError
from heatssl.export import kept_backbones, load_backbone
from heatssl.files import write_atomically
from heatssl.training import pretrain
from heatssl.training.run import build_module

MakeConfig = Callable[..., PretrainConfig]

FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["torch.save", "replace"])
def test_full_disk_keeps_the_earlier_checkpoint(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    config = make_config(steps=12, checkpoint_every=4, knn_every=0)
    save, replace = torch.save, Path.replace

    def save_until_full(checkpoint: dict[str, Any], file: io.BufferedWriter) -> None:
        if checkpoint["global_step"] == 8:
            file.write(b"half")
            raise FULL
        save(checkpoint, file)

    def replace_until_full(path: Path, target: Path) -> Path:
        if target.name == "last.ckpt" and target.exists():
            raise FULL
        return replace(path, target)

    with monkeypatch.context() as patched:
        if where == "torch.save":
            patched.setattr(torch, "save", save_until_full)
        else:
            patched.setattr(Path, "replace", replace_until_full)
        with pytest.raises(UserError, match=r"no space left on device.*last\.ckpt.*run the same command again"):
            pretrain(config)
    checkpoints = Path(config.output) / "checkpoints"
    assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"], "no half-written file stays"
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 4
    pretrain(config)
    assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 12


def test_torch_hides_a_full_disk_behind_another_error(tmp_path: Path) -> None:
    """torch.save turns a failed write into a RuntimeError: it must still be told as what it is."""

    class Full(io.RawIOBase):
        def write(self, data: Any) -> int:
            raise FULL

    with pytest.raises(UserError, match="no space left on device"):
        write_atomically(tmp_path / "x.ckpt", lambda _: torch.save({"a": torch.zeros(10)}, Full()))
    assert list(tmp_path.iterdir()) == []


def too_little_space(monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))


def test_too_little_space_is_found_before_the_first_step_and_leaves_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    too_little_space(monkeypatch)
    with pytest.raises(UserError, match=r"0 MiB free.*choose another output"):
        pretrain(make_config("runs/deep/run"))
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_leaves_a_run_as_it_was(make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"steps": 4, "checkpoint_every": 2, "knn_every": 0}
    with monkeypatch.context() as patched:
        patched.setattr("heatssl.training.run.finish", lambda *_: None)  # so that something is left to do
        folder = pretrain(make_config(**settings))
    last = torch.load(folder / "checkpoints/last.ckpt", weights_only=True)
    torch.save(last | {"global_step": 2}, folder / "checkpoints/last.ckpt")
    (folder / "checkpoints/last.ckpt.tmp").write_text("half-written")
    before = {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in folder.rglob("*")}
    too_little_space(monkeypatch)
    with pytest.raises(UserError, match="0 MiB free"):
        pretrain(make_config(**settings, log_every=1))
    assert before == {path: (path.stat().st_mtime_ns, path.is_file() and path.read_bytes()) for path in before}
    assert set(folder.rglob("*")) == set(before)


def test_a_full_disk_before_the_first_step_leaves_nothing(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    write_text = Path.write_text

    def until_full(path: Path, text: str, **options: Any) -> int:
        write_text(path, text[:5], **options)
        raise FULL

    monkeypatch.setattr(Path, "write_text", until_full)
    with pytest.raises(UserError, match="no space left on device"):
        pretrain(make_config("runs/run"))
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_called_a_full_disk(tmp_path: Path) -> None:
    def broken(_: object) -> None:
        raise RuntimeError("something else")

    (tmp_path / "x").write_text("old")
    with pytest.raises(RuntimeError, match="something else"):
        write_atomically(tmp_path / "x", broken)
    assert (tmp_path / "x").read_text() == "old"


def test_backbones_that_stay_are_sources_and_survive_a_stop(make_config: MakeConfig) -> None:
    """Attention across checkpoints needs the weights of several steps, the untrained ones first."""
    config = make_config(steps=6, keep_every=3, checkpoint_every=2, knn_every=0)
    folder = pretrain(config)
    kept = kept_backbones(folder)
    assert {step: path.name for step, path in kept.items()} == {
        0: "step_00000000_backbone.safetensors",
        3: "step_00000003_backbone.safetensors",
        6: "backbone.safetensors",
    }
    untrained = build_module(config).objective.backbone.state_dict()
    first, last = (load_backbone(path)[0].state_dict() for path in (kept[0], kept[6]))
    assert all(torch.equal(first[name], untrained[name]) for name in untrained)
    assert not torch.equal(first["patch_embed.proj.weight"], last["patch_embed.proj.weight"])
    assert load_backbone(kept[3])[1].step == 3
    before = kept[3].stat().st_mtime_ns
    (folder / "objective.safetensors").unlink()
    pretrain(config)
    assert kept[3].stat().st_mtime_ns == before, "a run that is done keeps what it kept"
    kept[3].write_bytes(b"half")
    with pytest.raises(UserError, match=r"step_00000003_backbone\.safetensors is damaged"):
        kept_backbones(folder)


def test_kept_backbones_count_for_the_space_that_is_needed(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = make_config(steps=600, keep_every=1)
    parameters = sum(p.numel() for p in build_module(config).parameters())
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=parameters * 4 * 600))
    with pytest.raises(UserError, match="choose another output"):
        pretrain(config)
