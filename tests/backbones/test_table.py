"""`heatssl models`: what a user reads before choosing a backbone."""

import pytest

from heatssl.backbones.table import model_figures, print_models
from heatssl.config import ModelsConfig
from heatssl.errors import UserError


def test_counts_are_those_of_the_model_at_its_own_size(capsys):
    figures = model_figures("vit_tiny_patch16_224")
    assert figures.parameters == 5_717_416
    assert figures.input_size == (3, 224, 224)
    # twelve blocks of 24 n d^2 + 4 n^2 d, embedding and head, counted by hand
    n, d = 197, 192
    assert figures.operations == pytest.approx(
        12 * (24 * n * d**2 + 4 * n**2 * d) + 2 * 196 * 768 * d + 2 * d * 1000, rel=0.01
    )
    print_models(ModelsConfig(names="vit_tiny_patch16_224, gau_tiny_*"))
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [
        "name",
        "gau_tiny_patch8_96",
        "gau_tiny_patch16_224",
        "vit_tiny_patch16_224",
    ]
    assert lines[-1].split()[1:] == ["5.72", "M", f"{figures.operations / 1e9:.2f}", "3x224x224"]


@pytest.mark.parametrize("name", ["test_vit3", "cait_xxs24_224"])
def test_models_that_look_at_views_of_their_parameters_are_counted(name):
    assert model_figures(name).operations > 0


def test_a_pattern_that_matches_nothing_is_named():
    with pytest.raises(UserError, match="names=gua_small matches no model"):
        print_models(ModelsConfig(names="gua_small"))


def test_each_pattern_is_held_against_the_names():
    names = "levit_128,gau_tiny_patch16_224.untrained"
    with pytest.raises(
        UserError, match=r"names=gau_tiny_patch16_224\.untrained matches no model: did you mean 'gau_tiny"
    ):
        print_models(ModelsConfig(names=names))
    with pytest.raises(UserError, match="matches no model"):
        print_models(ModelsConfig(names=" , "))
