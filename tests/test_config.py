"""Settings: what is composed is what was asked for, and a mistake is told in one line that names the fix."""

import dataclasses
import inspect
from pathlib import Path

import pytest
import yaml
from omegaconf import DictConfig, ListConfig

from heatssl.composition import compose
from heatssl.config import KEEPS_RESULT, SCHEMAS, PretrainConfig, setting_types
from heatssl.config_file import differences, flatten, load_config, save_config
from heatssl.config_folder import config_folder, options
from heatssl.errors import UserError
from heatssl.objectives import names, objective_class

RECIPES = options("recipe")


def nodes(value: object) -> list[object]:
    """A value and everything in it."""
    if isinstance(value, dict):
        return [value, *(node for part in value.values() for node in nodes(part))]
    if isinstance(value, list):
        return [value, *(node for part in value for node in nodes(part))]
    return [value]


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_every_command_composes_to_its_plain_dataclass(command: str) -> None:
    """A DictConfig in a checkpoint cannot be loaded again with weights_only, the default of torch.load."""
    config = compose(command, [])
    assert type(config) is SCHEMAS[command]
    assert not any(isinstance(node, DictConfig | ListConfig) for node in nodes(vars(config)))
    assert not any(isinstance(node, DictConfig | ListConfig) for node in nodes(dataclasses.asdict(config)))


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_command_line_wins_over_a_recipe_and_a_recipe_over_defaults(recipe: str) -> None:
    asked = compose("pretrain", [f"recipe={recipe}", "data.root=/images", "optimizer.warmup_steps=7"])
    assert asked.output == f"runs/{recipe}"
    assert asked.optimizer.warmup_steps == 7
    first = compose("pretrain", ["optimizer.warmup_steps=7", "data.root=/images", f"recipe={recipe}"])
    assert first == asked, "the order of words on the command line must not matter"


def test_a_recipe_chooses_data_and_the_command_line_may_choose_other_data() -> None:
    recipe = "recipe=imagenet_vit_small"
    chosen = compose("pretrain", [recipe, "data.root=/imagenet"])
    assert (chosen.data.name, chosen.data.image_size, chosen.data.expected_classes) == ("folder", 224, 1000)
    assert chosen.objective["decoder_width"] == 256
    assert compose("pretrain", [recipe, "data=tar", "data.root=/imagenet.tar"]).data.name == "tar"


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_opens_with_what_one_wants_to_know_before_starting_it(recipe: str) -> None:
    text = (config_folder() / "recipe" / f"{recipe}.yaml").read_text()
    comments = text.partition("defaults:")[0]
    for heading in ("Paper:", "Hardware:", "Hours:", "Expected:", f"heatssl pretrain recipe={recipe}"):
        assert heading in comments, f"{recipe}.yaml does not say {heading!r}"


@pytest.mark.parametrize(
    ("words", "objective", "target"),
    [
        ([], "heat_completion", "plain"),
        (["data=shapes", "objective.rest_weight=2.0"], "heat_completion", "plain"),
        (["data=folder", "data.root=/images"], "heat_jepa", None),
        (["data=tar", "data.root=/images.tar", "objective.temperature=0.2"], "heat_jepa", None),
        (["data=folder", "data.root=/images", "objective=heat_completion"], "heat_completion", "normalised"),
        (["recipe=qb_heat"], "qb_heat", "plain"),
    ],
)
def test_the_objective_follows_the_data_unless_another_is_named(
    words: list[str], objective: str, target: str | None
) -> None:
    """No single one wins on photographs and on scenes (docs/recipe.md)."""
    chosen = compose("pretrain", words).objective
    assert (chosen["name"], chosen.get("target")) == (objective, target)


def test_demo_is_the_demo_recipe() -> None:
    assert compose("demo", ["seed=3"]) == compose("pretrain", ["recipe=demo", "seed=3"])


def test_evaluation_uses_the_images_of_the_run_unless_others_are_named() -> None:
    assert compose("probe", []).data is None
    other = compose("probe", ["data=folder", "data.root=/images", "data.val_size=96"]).data
    assert (other.name, other.root, other.val_size) == ("folder", "/images", 96)


def test_images_are_not_given_in_braces_to_an_evaluation() -> None:
    """There are no settings of theirs beneath, which the braces could change."""
    with pytest.raises(UserError, match="choose one of folder, images, shapes, tar"):
        compose("knn", ["data={name: tar}"])


def test_backbone_arguments_take_any_key_one_by_one() -> None:
    config = compose("pretrain", ["recipe=demo", "backbone_arguments.depth=2", "backbone_arguments.qk_norm=true"])
    assert config.backbone_arguments["depth"] == 2
    assert config.backbone_arguments["qk_norm"] is True
    assert config.backbone_arguments["patch_size"] == 8


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("backbone_arguments.img_size=128", "set data.image_size instead"),
        ("backbone_arguments={num_classes: 10}", "leave it out"),
        ("backbone_arguments={in_chans: 1}", "images have three colours"),
        ("data.mean=[0.5]", "three numbers"),
        ("data.std=[0.2,0.2]", "three positive numbers"),
        ("data.std=[0.2,0.0,0.2]", "three positive numbers"),
    ],
)
def test_what_would_build_or_feed_another_model_than_was_meant_is_refused(word: str, fix: str) -> None:
    """A backbone for images of 128 pixels would be shown those of 64, at several times the cost or worse."""
    with pytest.raises(UserError, match=fix) as caught:
        compose("pretrain", [word])
    assert word.partition("=")[0].partition(".")[0] in str(caught.value)


@pytest.mark.parametrize(
    "path",
    ["/a b/c", "/a,b", "/a=b", "/a(1)/[x]{y}", "/it's", "relative/x.tar", "/ünï", "1e3", "[a]", "a: b", "#x"],
)
def test_paths_are_taken_as_they_stand(path: str) -> None:
    """Hydra's grammar reads commas, brackets and quotes as its own; a path must come through."""
    assert compose("pretrain", ["data=folder", f"data.root={path}"]).data.root == path


def test_home_is_expanded_where_the_shell_does_not() -> None:
    root = compose("pretrain", ["data=folder", "data.root=~/images"]).data.root
    assert root == str(Path("~/images").expanduser())


@pytest.mark.parametrize(
    ("override", "wanted"),
    [
        ("trainer.step=3", "unknown key 'trainer.step': did you mean 'trainer.steps'?"),
        ("steps=3", "did you mean 'trainer.steps'?"),
        ("trainr.batch_size=3", "did you mean 'trainer.batch_size'?"),
        ("+trainer.step=3", "did you mean 'trainer.steps'?"),
        ("trainer={stepz: 3}", "unknown key 'trainer.stepz': did you mean 'trainer.steps'?"),
        ("recipie=demo", "did you mean 'recipe'?"),
        ("optimizer.zzz=3", "optimizer has name, learning_rate"),
        ("zzz=3", "heatssl pretrain --help"),
        ("objective.visible_rati=1", "did you mean 'objective.visible_ratio'?"),
        ("objective={visible_rati: 1}", "did you mean 'objective.visible_ratio'?"),
        ("objective.foo=3", "objective has name, mask"),
        ("objective.mask=3", "objective.mask=3: expected a word, such as random"),
        (
            "objective.visible_ratio=warm",
            "objective.visible_ratio=warm: expected a number, such as 0.25",
        ),
        ("objective=qb_heap", "unknown objective 'qb_heap': did you mean 'qb_heat'? choose one of"),
        ("prior=laplas", "did you mean 'laplace'? choose one of"),
        ("prior.wieght=1", "unknown key 'prior.wieght'"),
        ("prior.weight=1", "unknown key 'prior.weight' of prior=none: choose a law first, such as prior=laplace"),
        ("data=nope", "unknown data 'nope': choose one of folder, images, shapes, tar"),
        ("recipe=imagnette_cpu", "did you mean 'imagenette_cpu'?"),
        ("data=folder", "data=folder needs data.root=PATH"),
        ("trainer.steps=abc", "trainer.steps=abc: expected a whole number"),
        ("trainer.steps=1.5", "trainer.steps=1.5: expected a whole number"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate=fast: expected a number"),
        ("data.flip=perhaps", "data.flip=perhaps: expected true or false"),
        ("data.train_size=x", "data.train_size=x: expected a whole number or null"),
        ("optimizer.betas=0.9", "optimizer.betas=0.9: expected a list of numbers"),
        ("data.crop_scale=[a,b]", "data.crop_scale=[a,b]: expected a list of numbers"),
        ("trainer=3", "trainer=3: expected several settings"),
        ("trainer.steps=1,2", "one value at a time"),
        ("optimizer.betas=[0.9", "cannot be read"),
        ("trainer.steps", "'trainer.steps' is not of the form key=value"),
        ("=3", "is not of the form key=value"),
    ],
)
def test_a_mistake_is_told_in_one_line_that_names_the_fix(override: str, wanted: str) -> None:
    with pytest.raises(UserError) as error:
        compose("pretrain", [override])
    assert wanted in str(error.value)
    assert "\n" not in str(error.value)


def test_a_setting_of_data_without_data_names_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"data\.root needs data=folder or"):
        compose("knn", ["data.root=/images"])


@pytest.mark.parametrize("name", names())
def test_the_yaml_of_an_objective_is_its_signature(name: str) -> None:
    """Otherwise a setting could not be reached, or would be refused only after the data was opened."""
    given = yaml.safe_load((config_folder() / "objective" / f"{name}.yaml").read_text())
    assert given.pop("name") == name
    parameters = list(inspect.signature(objective_class(name).__init__).parameters.values())
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    assert given == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


@pytest.mark.parametrize("name", options("data"))
def test_the_yaml_of_a_data_set_names_itself(name: str) -> None:
    assert yaml.safe_load((config_folder() / "data" / f"{name}.yaml").read_text())["name"] == name


def test_a_saved_configuration_comes_back_equal(tmp_path: Path) -> None:
    config = compose("pretrain", ["recipe=demo", "optimizer.final_learning_rate=1e-7", "output=/a 'b', #c: d"])
    save_config(config, tmp_path / "run" / "config.yaml")
    assert load_config(tmp_path / "run" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


def test_an_interrupted_save_leaves_the_old_configuration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "config.yaml"
    save_config(PretrainConfig(seed=1), path)
    monkeypatch.setattr(Path, "replace", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        save_config(PretrainConfig(seed=2), path)
    assert load_config(path).seed == 1


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "is not a run folder"),
        ("seed: [1", "cannot be read"),
        ("- 1", "cannot be read"),
        ("sead: 1", "sead"),
        ("seed: abc", "cannot be read"),
    ],
)
def test_a_configuration_that_cannot_be_read_says_which_and_why(text: str | None, wanted: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError) as error:
        load_config(path)
    assert wanted in str(error.value)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


def test_a_prior_brings_its_own_settings() -> None:
    config = compose("pretrain", ["recipe=demo", "prior=laplace", "prior.weight=0.1", "prior.layers=[0,blocks.3]"])
    assert config.prior["name"] == "laplace"
    assert (config.prior["weight"], config.prior["layers"]) == (0.1, [0, "blocks.3"])
    assert compose("pretrain", ["recipe=demo"]).prior == {"name": "none"} == PretrainConfig().prior
    with pytest.raises(UserError, match=r"prior\.layers=3: expected"):
        compose("pretrain", ["prior=laplace", "prior.layers=3"])


def test_differences_are_those_that_change_the_result() -> None:
    stored = compose("pretrain", ["recipe=demo"])
    same = compose("pretrain", ["recipe=demo", "output=elsewhere", "data.workers=0", "trainer.log_every=1"])
    assert differences(stored, same) == []
    other = compose("pretrain", ["recipe=demo", "trainer.steps=10", "objective.flow=steady"])
    assert differences(stored, other) == [
        "objective.flow=kernel (asked: steady)",
        f"trainer.steps={stored.trainer.steps} (asked: 10)",
    ]
    deeper = compose("pretrain", ["recipe=demo", "backbone_arguments.qk_norm=true"])
    assert differences(stored, deeper) == ["backbone_arguments.qk_norm=unset (asked: True)"]


def test_what_keeps_the_result_are_real_keys() -> None:
    """A renamed key would silently start to count as a difference."""
    assert set(setting_types(PretrainConfig)) >= KEEPS_RESULT
    assert set(flatten(dataclasses.asdict(PretrainConfig()))) >= KEEPS_RESULT


@pytest.mark.parametrize("recipe", ["demo", "qb_heat"])  # composing takes a third of a second
@pytest.mark.parametrize("objective", ["mae", "finola", "heat_completion"])
def test_another_objective_beside_a_recipe_has_its_own_settings(recipe: str, objective: str) -> None:
    """What a recipe sets is for its own objective; what the user says stands."""
    alone = compose("pretrain", ["data=shapes", f"objective={objective}"]).objective
    both = ["data=shapes", f"recipe={recipe}", f"objective={objective}"]
    of_recipe = compose("pretrain", ["data=shapes", f"recipe={recipe}"]).objective
    assert compose("pretrain", both).objective == (of_recipe if of_recipe["name"] == objective else alone)


def test_what_is_said_beside_a_recipe_and_another_objective_stands() -> None:
    words = ["recipe=demo", "objective=mae", "objective.target=plain"]
    assert compose("pretrain", words).objective["target"] == "plain"
    with pytest.raises(UserError, match=r"unknown key 'objective.target'"):
        compose("pretrain", ["recipe=demo", "objective=heat_jepa", "objective.target=plain"])


def test_another_backbone_beside_a_recipe_has_its_own_arguments() -> None:
    """Heads and depth of a recipe's ViT are no arguments of a GAU, nor of a larger ViT."""

    def arguments(*words: str) -> dict[str, object]:
        return compose("pretrain", ["recipe=demo", *words]).backbone_arguments

    of_recipe = arguments()
    assert arguments("backbone=vit_tiny_patch16_224") == of_recipe
    assert arguments("backbone_arguments.depth=2") == of_recipe | {"depth": 2}
    assert arguments("backbone=vit_small_patch16_224") == {}
    assert arguments("backbone=gau_tiny_patch16_224", "backbone_arguments.depth=2") == {"depth": 2}
    assert arguments("backbone_arguments={depth: 2}") == {"depth": 2}
    assert arguments("backbone_arguments={}") == {}
    with pytest.raises(UserError, match="backbone_arguments"):
        arguments("backbone_arguments=nothing")
