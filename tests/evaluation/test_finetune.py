"""Fine-tuning trains what it says, at the rates it says, and an interruption changes nothing."""

import dataclasses
import json

import pytest
import safetensors.torch
import torch

from heatssl.backbones import create_backbone
from heatssl.cli import main
from heatssl.config import DataConfig, FinetuneConfig
from heatssl.config_file import load_config
from heatssl.data import open_split
from heatssl.errors import UserError
from heatssl.evaluation import finetune, run_finetune
from heatssl.evaluation.checkpoint import Checkpoint
from heatssl.evaluation.finetune import Classifier, timm_optimizer
from heatssl.evaluation.source import open_source
from heatssl.export import load_backbone, save_backbone

QUICK = {"workers": 0, "epochs": 2, "batch_size": 16, "warmup_epochs": 1.0, "accelerator": "cpu"}


def test_each_layer_has_its_share_of_the_learning_rate():
    backbone = create_backbone("vit_tiny_patch16_224", 32, depth=2, embed_dim=24, num_heads=2, patch_size=8)
    model = Classifier(backbone, 5)
    optimizer = timm_optimizer(model, FinetuneConfig(layer_decay=0.5, learning_rate=1.0, weight_decay=0.1))
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {
        names[id(parameter)]: (group.get("lr_scale", 1.0), group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    assert found.keys() == dict(model.named_parameters()).keys()
    assert found["head.weight"] == (1.0, 0.1)
    assert found["head.bias"] == (1.0, 0.0)
    scales = [found[f"backbone.{name}"][0] for name in ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight")]
    assert scales[0] < scales[1] < found["backbone.blocks.1.mlp.fc1.weight"][0] <= 1
    assert found["backbone.blocks.1.mlp.fc1.weight"][0] == 2 * scales[1]
    assert found["backbone.pos_embed"][1] == found["backbone.blocks.0.norm1.weight"][1] == 0


def test_labels_are_learned_and_the_classifier_is_kept(run):
    settings = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0, "ema": 0.0, "learning_rate": 2e-2, "layer_decay": 1.0}
    settings |= {"crop_scale": [0.9, 1.0]}
    (result,) = run_finetune(FinetuneConfig(run=str(run), **QUICK | {"epochs": 80}, **settings))
    assert result.metric == "finetune"
    path, config = run / "finetuned.safetensors", load_config(run / "config.yaml")
    model = Classifier(create_backbone(config.backbone, 32, **config.backbone_arguments), 10)
    model.load_state_dict(safetensors.torch.load_file(path))
    found = {
        split: finetune.accuracy(model, open_split(config.data, split), config.data, torch.device("cpu"))[0]
        for split in ("train", "val")
    }
    assert found["train"] > 0.5, "of ten classes"
    assert found["val"] == result.accuracy
    with safetensors.safe_open(path, "pt") as file:
        assert len(json.loads(file.metadata()["classes"])) == 10
    assert "80 epochs" in result.protocol


def test_colours_stay_as_they_are_whatever_pretraining_did_to_them(run, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune, "train_on_labels", lambda loss, optimizer, images, data, *_, **__: seen.append(data))
    data = DataConfig(image_size=32, train_size=40, val_size=20, workers=0, colour_jitter=0.8, grey=0.2, flip=False)
    run_finetune(FinetuneConfig(run=str(run), data=data, **QUICK))
    assert (seen[0].colour_jitter, seen[0].grey, seen[0].flip) == (0.0, 0.0, False)


@pytest.fixture
def untrained(monkeypatch):
    """Fine-tuning that keeps the classifier as it was made: a list of those."""
    made = []

    def fit(model, *_):
        made.append(model)
        return model.eval()

    monkeypatch.setattr(finetune, "fit", fit)
    return made


def test_the_fine_tuned_backbone_is_a_source_as_any_other(run, untrained):
    """A classifier that took hours would otherwise be of no use to any command."""
    run_finetune(FinetuneConfig(run=str(run), **QUICK))
    backbone, info = load_backbone(run / "finetuned.safetensors")
    found, expected = backbone.state_dict(), untrained[0].backbone.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert info == load_backbone(run)[1]


@pytest.mark.parametrize("rate", [0.25, 0.0])
def test_a_backbone_that_was_pretrained_with_drop_path_gets_that_of_fine_tuning(run, untrained, rate):
    info = load_backbone(run)[1]
    info.arguments.update(depth=2, drop_path_rate=0.5)
    save_backbone(run, create_backbone(info.name, info.image_size, **info.arguments), info)
    run_finetune(FinetuneConfig(run=str(run), drop_path=rate, **QUICK))
    assert getattr(untrained[0].backbone.blocks[1].drop_path1, "drop_prob", 0.0) == rate


class InterruptedRunError(Exception):
    """As if the machine had gone down."""


@pytest.mark.parametrize("ema", [0.9, 0.0])
def test_after_an_interruption_it_goes_on_as_if_nothing_had_been(write_run, tmp_path, monkeypatch, capsys, ema):
    accuracies, weights = [], []
    real = Checkpoint.save
    for name, interrupt in (("whole", False), ("parts", True)):
        run = write_run(tmp_path / name)
        config = FinetuneConfig(run=str(run), ema=ema, **QUICK)
        if interrupt:

            def save(self, step):
                real(self, step)
                raise InterruptedRunError

            monkeypatch.setattr(Checkpoint, "save", save)
            with pytest.raises(InterruptedRunError):
                run_finetune(config)
            monkeypatch.setattr(Checkpoint, "save", real)
        (result,) = run_finetune(config)
        accuracies.append(result.accuracy)
        weights.append(safetensors.torch.load_file(run / "finetuned.safetensors"))
        assert not list(run.glob("finetune_*.ckpt"))
    assert "going on from step 5 of" in capsys.readouterr().out
    assert accuracies[0] == accuracies[1]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


def test_other_settings_do_not_go_on_from_there(run, monkeypatch, capsys):
    def save(self, step):
        real(self, step)
        raise InterruptedRunError

    real = Checkpoint.save
    monkeypatch.setattr(Checkpoint, "save", save)
    with pytest.raises(InterruptedRunError):
        run_finetune(FinetuneConfig(run=str(run), **QUICK))
    monkeypatch.setattr(Checkpoint, "save", real)
    run_finetune(FinetuneConfig(run=str(run), **QUICK, smoothing=0.2))
    assert "going on" not in capsys.readouterr().out


def test_convolutional_models_and_the_command_line(tmp_path, capsys):
    words = ["data=shapes", "data.train_size=40", "data.val_size=20", "workers=0", "epochs=1", "batch_size=8"]
    output = tmp_path / "out"
    source = "timm:test_resnet?random"
    assert main(["finetune", f"run={source}", *words, f"output={output}", "drop_path=0", "precision=bf16"]) == 0
    assert "all weights trained for 1 epochs" in capsys.readouterr().out
    (kept,) = output.glob("*finetuned.safetensors")
    assert kept.name == "timm_test_resnet_random_finetuned.safetensors", "weights of two models may share an output"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["batch_size=3"], "batch_size even"),
        (["layer_decay=0"], "layer_decay must be in"),
        (["smoothing=1"], "smoothing must be in [0, 1)"),
        (["learning_rate=0"], "learning_rate must be over 0 and finite, not 0"),
        (["learning_rate=-1"], "learning_rate must be over 0 and finite, not -1"),
        (["learning_rate=nan"], "learning_rate must be over 0 and finite, not nan"),
        (["weight_decay=-1"], "weight_decay must be 0 or more and finite, not -1"),
        (["warmup_epochs=-3"], "warmup_epochs must be 0 or more and finite, not -3"),
        (["mixup=nan"], "mixup must be 0 or more and finite, not nan"),
        (["cutmix=inf"], "cutmix must be 0 or more and finite, not inf"),
        (["gradient_clip=-1"], "gradient_clip must be 0 or more and finite, not -1"),
        (["crop_scale=[7,9]"], "error: crop_scale=[7.0, 9.0] is no range of areas"),
        (["crop_scale=[nan,1]"], "error: crop_scale=[nan, 1.0] is no range of areas"),
        (["precision=16"], "use 32 or bf16"),
        (["learning_rate=1e30", "warmup_epochs=0", "gradient_clip=0"], "lower the learning rate"),
    ],
)
def test_what_cannot_work_is_named(run, capsys, words, message):
    assert main(["finetune", f"run={run}", "workers=0", "epochs=3", *words]) == 2
    assert message in capsys.readouterr().err


def test_processes_that_cannot_share_a_batch_say_so(run, monkeypatch):
    monkeypatch.setattr("heatssl.evaluation.supervised.rank_and_world", lambda: (0, 3))
    with pytest.raises(UserError, match="3 processes cannot share 16 images in pairs: choose another batch_size"):
        run_finetune(FinetuneConfig(run=str(run), **QUICK))


def test_processes_that_find_different_states_do_not_go_on(tmp_path, monkeypatch):
    """A folder that only the first can see: the others would begin again, and all would wait for each other."""
    kept = Checkpoint(tmp_path / "state.ckpt", "key", {"model": torch.nn.Linear(2, 2)})
    kept.save(5)
    monkeypatch.setattr("heatssl.evaluation.checkpoint.rank_and_world", lambda: (0, 2))
    monkeypatch.setattr("heatssl.evaluation.checkpoint.total", lambda step: step + 0)
    with pytest.raises(UserError, match=r"not all processes find the same .*state\.ckpt"):
        kept.load()


def test_the_row_tells_what_was_done_to_images_and_steps(run, untrained):
    data = DataConfig(image_size=32, train_size=40, val_size=20, workers=0)
    settings = {"precision": "bf16", "gradient_clip": 0.5, "crop_scale": [0.3, 0.9], "warmup_epochs": 1.5}
    base = FinetuneConfig(run=str(run), data=data, **QUICK | settings)
    (flipped,) = run_finetune(base)
    for said in (
        "2 epochs on random crops of 30 to 90 % and flips",
        "1.5 epochs of warm-up, then cosine",
        "gradients clipped at norm 0.5",
        "bfloat16",
    ):
        assert said in flipped.protocol
    changed = dataclasses.replace(base, data=dataclasses.replace(data, flip=False), precision="32", gradient_clip=0.0)
    (plain,) = run_finetune(changed)
    assert "random crops of 30 to 90 %, no flips" in plain.protocol
    assert "float32" in plain.protocol
    assert "clipped" not in plain.protocol


def test_a_training_without_flips_is_another(run):
    """It would go on from the state of one with them, and its result would take the place of the other's."""
    data = DataConfig(image_size=32, train_size=40, val_size=20, workers=0)
    keys = [
        open_source(config).key("finetune", config)
        for config in (
            FinetuneConfig(run=str(run), data=dataclasses.replace(data, flip=flip)) for flip in (True, True, False)
        )
    ]
    assert keys[0] == keys[1] != keys[2]
