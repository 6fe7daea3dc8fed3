"""Words of a command line mean the settings that a user would take them for."""

import pytest

from heatssl.composition import compose
from heatssl.errors import UserError
from heatssl.words import settings


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["seed=1", "data=folder"], ["seed=1", "data=folder"]),
        (["--seed", "1", "--batch-size=32"], ["seed=1", "batch_size=32"]),
        (["--data.root", "a b"], ["data.root=a b"]),
        (["--random-init", "false", "--seed", "1"], ["random_init=false", "seed=1"]),
        (["--random-init", "--seed", "1"], ["random_init=true", "seed=1"]),
        (["--random-init"], ["random_init=true"]),
        (["+objective.law=copy", "~backbone_arguments.depth="], ["+objective.law=copy", "~backbone_arguments.depth="]),
        ([], []),
    ],
)
def test_options_are_settings(words, expected):
    assert settings("knn", words) == expected


def test_plain_words_are_the_list_that_a_command_is_about():
    assert settings("evaluate", ["a", "--suite", "full", "b"]) == ["suite=full", "sources=['a','b']"]


def test_a_model_is_what_runs_are_elsewhere():
    wanted = ["score=true", "run=timm:vit_small_patch16_224", "images=['cat.jpg']"]
    assert settings("attribute", ["cat.jpg", "--score", "--model", "timm:vit_small_patch16_224"]) == wanted
    with pytest.raises(UserError, match="name the same thing"):
        settings("attribute", ["--model", "timm:a", "run=b"])


def test_lists_are_written_as_people_write_them():
    wanted = ["methods=[gradcam,ig]", "ignore=[3]", "scores=[all]", "run=r"]
    words = ["--method", "gradcam,ig", "--ignore", "3", "--scores=[all]", "--model", "r"]
    assert settings("attribute", words) == wanted
    assert compose("attribute", wanted).methods == ["gradcam", "ig"]


@pytest.mark.parametrize("name", ["runs/a", "timm:vit_small_patch16_224.dino?random", "it's, [odd] {path}", "~b"])
def test_any_path_arrives_as_it_was_written(name):
    config = compose("evaluate", settings("evaluate", [name, "second"]))
    assert config.sources == [name, "second"]


@pytest.mark.parametrize(
    ("command", "words", "message"),
    [
        ("knn", ["runs/a"], "'runs/a' is not of the form key=value; see heatssl knn --help"),
        ("knn", ["--seed"], "--seed needs a value"),
        ("evaluate", ["a", "sources=[b]"], "name the same things"),
    ],
)
def test_mistakes_are_named(command, words, message):
    with pytest.raises(UserError, match=message):
        settings(command, words)
