"""Data that would give a wrong or meaningless number end in one line, exit code 2, and no number."""

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from heatssl.cli import main
from heatssl.composition import compose
from heatssl.config import DataConfig
from heatssl.config_file import load_config, save_config
from heatssl.data import open_split
from heatssl.errors import UserError
from heatssl.export import load_backbone, save_backbone

COMMANDS = {
    "knn": ["knn", "k=2"],
    "probe": ["probe"],
    "attentive": ["probe", "head=attentive", "epochs=1"],
    "mae": ["probe", "protocol=mae", "epochs=1", "batch_size=4"],
    "finetune": ["finetune", "epochs=1", "batch_size=4", "drop_path=0"],
}


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four images of each of three classes in train and in val."""
    root = tmp_path / "images"
    for split in ("train", "val"):
        for name in ("cat", "dog", "emu"):
            (root / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = np.random.default_rng((len(split), ord(name[0]), i)).integers(0, 256, (32, 32, 3))
                Image.fromarray(pixels.astype(np.uint8)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture
def refused(run: Path, images: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command on the images, expects it to refuse them, and gives what it said."""

    def refuse(command: str, *words: str) -> str:
        data = ["data=folder", f"data.root={images}", "workers=0", "random_init=false"]
        arguments = [*COMMANDS[command], f"run={run}", *data, *words]
        assert main(arguments) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith("heatssl: error: ")
        assert "\n" not in error
        assert not (run / "evaluation.json").exists()
        return error

    return refuse


@pytest.mark.parametrize("command", COMMANDS)
def test_a_class_that_only_train_has(command: str, images: Path, refused: Callable[..., str]) -> None:
    shutil.rmtree(images / "val" / "dog")
    error = refused(command)
    assert "val has no image of class 'dog', which train has: add some to val, or take the class out of train" in error


def test_classes_that_differ_are_named_in_both_directions(images: Path, refused: Callable[..., str]) -> None:
    (images / "val" / "dog").rename(images / "val" / "fox")
    error = refused("knn")
    assert "has class 'fox', which train lacks, and lacks 'dog', which train has" in error


def test_labels_follow_names_and_not_their_order(images: Path) -> None:
    """With a class missing in val, positions among val's own folders would shift."""
    shutil.rmtree(images / "val" / "cat")
    val = open_split(DataConfig(name="folder", root=str(images)), "val")
    assert [val.classes[label] for label in val.labels] == [Path(val.name(i)).parent.name for i in range(len(val))]
    assert set(val.labels) == {1, 2}


@pytest.mark.parametrize("command", ["knn", "probe", "mae", "finetune"])
def test_one_class(command: str, images: Path, refused: Callable[..., str]) -> None:
    for split in ("train", "val"):
        for name in ("dog", "emu"):
            shutil.rmtree(images / split / name)
    assert "all 4 images of train are of class 'cat': add a folder of images for a second class" in refused(command)


def test_an_empty_class_folder(images: Path, refused: Callable[..., str]) -> None:
    for file in (images / "train" / "emu").iterdir():
        file.unlink()
    assert "train/emu holds no images: add some or remove the folder" in refused("probe")


def test_fewer_images_than_neighbours(
    images: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "heatssl.evaluation.split_features.extract_features", lambda *_, **__: pytest.fail("extracted first")
    )
    assert "k=13 neighbours cannot be found among 12 training images: set 1 <= k <= 12" in refused("knn", "k=[5,13]")
    assert "k=['five']: expected a whole number, or a list such as" in refused("knn", "k=[five]")
    assert "k=0" in refused("knn", "k=0")


@pytest.mark.parametrize("command", ["knn", "attentive"])
def test_weights_that_are_broken(command: str, run: Path, refused: Callable[..., str]) -> None:
    backbone, info = load_backbone(run)
    next(backbone.parameters()).data.fill_(float("nan"))
    save_backbone(run, backbone, info)
    error = refused(command)
    assert "features of 12 of 12 images are NaN or infinite" in error
    assert "train/cat/0.png first: the weights are broken, use an earlier checkpoint" in error


def test_a_single_image_that_breaks_is_named(
    images: Path, refused: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from heatssl.evaluation import readout

    real = readout.pooled_features
    white = Image.new("RGB", (32, 32), "white")
    white.save(images / "val" / "dog" / "2.png")

    def overflow(backbone: torch.nn.Module, shown: torch.Tensor) -> torch.Tensor:
        found = real(backbone, shown).clone()
        found[shown.std(dim=(1, 2, 3)) < 0.3] = torch.inf
        return found

    monkeypatch.setattr(readout, "pooled_features", overflow)
    error = refused("knn")
    assert f"features of 1 of 12 images are NaN or infinite: {images}/val/dog/2.png" in error
    assert "take these images out" in error


@pytest.mark.parametrize(
    ("words", "unused", "choice"),
    [
        (["probe", "head=attentive", "solver=sgd"], "solver=sgd", "head=attentive"),
        (["probe", "head=block", "iterations=3"], "iterations=3", "head=block"),
        (["probe", "epochs=5"], "epochs=5", "solver=logistic_regression"),
        (["probe", "solver=sgd", "iterations=3"], "iterations=3", "solver=sgd"),
        (["probe", "shots=1", "grid=[0.1]"], "grid=[0.1]", "shots or share"),
        (["probe", "draws=3"], "draws=3", "solver=logistic_regression"),
        (["probe", "protocol=mae", "held_out=0.2"], "held_out=0.2", "protocol=mae and a single learning rate"),
        (["segment", "k=3"], "k=3", "method=linear"),
        (["segment", "method=knn", "epochs=3"], "epochs=3", "method=knn"),
    ],
)
def test_settings_without_effect(
    words: list[str], unused: str, choice: str, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whoever sets them believes that the number is theirs."""
    assert main([words[0], f"run={run}", *words[1:]]) == 2
    assert f"{unused} has no effect with {choice}: leave it out" in capsys.readouterr().err
    assert not (run / "evaluation.json").exists()


OF_TRAINING = [
    "data.mean=[0.1,0.1,0.1]",
    "data.std=[0.1,0.1,0.1]",
    "data.crop_scale=[0.1,1]",
    "data.flip=false",
    "data.colour_jitter=1",
    "data.grey=1",
    "data.workers=0",
    "data.image_size=32",
]


@pytest.mark.parametrize(
    "command", ["knn", "probe", "segment", "health", "attribute", "finetune", "detect", "evaluate"]
)
def test_settings_of_images_that_only_training_looks_at(command: str) -> None:
    used = ["data.flip=false"] if command == "finetune" else []
    words = ["data=shapes", "data.val_size=9", "data.bad_fraction=0.5", *used]
    data = compose(command, words).data
    assert (data.val_size, data.flip) == (9, not used)
    for word in OF_TRAINING:
        if word not in used:
            key = word.partition("=")[0]
            with pytest.raises(UserError, match=rf"^{key} has no effect with {command}, .*: leave it out$"):
                compose(command, [*words, word])


def test_what_a_run_brings_along_is_not_refused(run: Path) -> None:
    config = load_config(run / "config.yaml")
    changed = dataclasses.replace(config.data, flip=False, crop_scale=[0.1, 0.2], grey=0.5, mean=[0.3, 0.3, 0.3])
    save_config(dataclasses.replace(config, data=changed), run / "config.yaml")
    assert main(["knn", f"run={run}", "workers=0", "random_init=false"]) == 0


def test_a_solver_that_is_none(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["probe", f"run={run}", "solver=typo"]) == 2
    assert "unknown solver 'typo': choose one of logistic_regression, sgd" in capsys.readouterr().err


@pytest.mark.parametrize("word", ["batch_size=0", "workers=-1", "seed=-1"])
@pytest.mark.parametrize(
    "command", ["knn", "probe", "segment", "health", "attribute", "finetune", "detect", "evaluate"]
)
def test_settings_that_no_command_can_use(
    command: str, word: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = word.partition("=")[0]
    words = [word if (command, name) != ("evaluate", "seed") else "seeds=[0,-1]"]
    words += [str(run), f"output={tmp_path / 'out'}"] if command == "evaluate" else [f"run={run}"]
    assert main([command, *words]) == 2
    error = capsys.readouterr().err
    assert name in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_small_subset_need_not_have_every_class(run: Path, images: Path) -> None:
    words = ["data=folder", f"data.root={images}", "data.val_size=2", "workers=0", "random_init=false", "k=3"]
    assert main(["knn", f"run={run}", *words]) == 0


@pytest.mark.parametrize("command", ["knn", "mae", "finetune"])
def test_a_val_that_cannot_be_read(command: str, images: Path, refused: Callable[..., str]) -> None:
    """An accuracy over the others would be another protocol's, and over none 0 %."""
    for file in (images / "val" / "emu").iterdir():
        file.write_text("no image")
    assert "4 of 12 images could not be read, over data.bad_fraction=0.01" in refused(command)


def test_an_accuracy_counts_the_images_that_it_is_of(run: Path, images: Path) -> None:
    next((images / "val" / "emu").iterdir()).write_text("no image")
    words = ["data=folder", f"data.root={images}", "data.bad_fraction=0.5", "workers=0", "random_init=false"]
    assert main([*COMMANDS["finetune"], f"run={run}", *words]) == 0
    assert "12 train, 11 val images" in (run / "evaluation.json").read_text()
