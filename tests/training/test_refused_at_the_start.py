"""What a run cannot do is told in one line before its folder is made, and what it finds there stays the user's."""

import pytest

from heatssl.cli import main

QUICK = ["data=shapes", "data.train_size=20", "data.val_size=10", "data.workers=0", "data.image_size=32"]
QUICK += ["trainer.steps=1", "trainer.batch_size=4", "trainer.knn_every=0"]
SMALL = ["backbone_arguments={patch_size: 8, embed_dim: 24, depth: 1, num_heads: 2}"]


@pytest.mark.parametrize(
    ("settings", "fix"),
    [
        (["backbone=vit_tiny_r_s16_p8_224", "objective=mae"], "encodes single patches"),
        (["backbone=xcit_nano_12_p16_224", "objective=simmim"], "more than patches"),
        (["backbone=cait_xxs24_224", "objective=qb_heat"], "cannot run cait_xxs24_224 at 32 px"),
        (["data.held_out=nan", *SMALL], "splits nothing"),
        (["data.mean=[nan,0,0]", *SMALL], "three numbers"),
        (["prior=laplace", "prior.layers=blocks.0", *SMALL], "a list, such as [-1]"),
        (["backbone_arguments={norm_layer: foo}"], "cannot be created"),
    ],
)
def test_one_line_and_no_folder(settings, fix, tmp_path, capsys):
    assert main(["pretrain", *QUICK, f"output={tmp_path / 'run'}", *settings]) == 2
    complaint = capsys.readouterr().err
    assert fix in complaint
    assert complaint.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_compiling_without_a_compiler_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("heatssl.training.checks.compiler", lambda: None)
    assert main(["pretrain", *QUICK, *SMALL, "trainer.compile=true", f"output={tmp_path / 'run'}"]) == 2
    assert "set it to false" in capsys.readouterr().err


def test_files_of_the_user_stay(tmp_path):
    """Only what a write of heatssl's own has left is cleared away: NAME.PID.tmp."""
    (tmp_path / "notes.tmp").write_text("precious")
    (tmp_path / "scratch.tmp").mkdir()
    (tmp_path / "last.ckpt.123.tmp").write_text("half")
    assert main(["pretrain", *QUICK, *SMALL, f"output={tmp_path}"]) == 0
    assert (tmp_path / "notes.tmp").read_text() == "precious"
    assert (tmp_path / "scratch.tmp").is_dir()
    assert not (tmp_path / "last.ckpt.123.tmp").exists()
