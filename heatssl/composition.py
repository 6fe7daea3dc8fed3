"""From the words of a command line to a typed configuration; mistakes come back as one line."""

import difflib
import math
import os
import types
from pathlib import Path
from typing import Any, get_args, get_origin

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException, ValidationError

from heatssl.config import SCHEMAS, DataConfig, PretrainConfig, setting_types
from heatssl.config_folder import config_folder, groups, options
from heatssl.errors import UserError, check_choice
from heatssl.unused import refuse_of_training

OPEN_SETTINGS = ("backbone_arguments", "objective", "prior")  # their keys stand in timm and in configs
EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    dict: "{key: value}",
}


def compose(command: str, overrides: list[str]) -> Any:
    """Compose ``configs/<command>.yaml`` with overrides such as ``data=folder`` and ``trainer.steps=10``.

    ``demo`` is ``pretrain`` with ``recipe=demo``.

    Returns:
        the command's dataclass of :mod:`heatssl.config`, made of plain Python objects only.

    Raises:
        UserError: on an unknown key (the nearest one is named), option or objective setting, a value of the
            wrong type, a setting that must be given and is not, or an argument that is no ``key=value``.
    """
    if command == "demo":
        return compose("pretrain", ["recipe=demo", *overrides])
    for name, schema in SCHEMAS.items():
        ConfigStore.instance().store(f"{name}_schema", schema)
    checked = [_checked(command, override, overrides) for override in overrides]
    if command == "pretrain":
        checked += _without_the_recipes(overrides)
    try:
        with initialize_config_dir(str(config_folder()), version_base="1.3"):
            composed = hydra_compose(command, checked)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(command, error, overrides)) from error
    _check_data(getattr(config, "data", None))
    if isinstance(config, PretrainConfig):
        _check_group("objective", config.objective)
        _check_group("prior", config.prior)
        _check_backbone(config.backbone_arguments)
    return config


def _checked(command: str, override: str, overrides: list[str]) -> str:
    """One ``key=value``, known to the command, in a form that Hydra's grammar reads as it was meant."""
    key, equals, value = override.partition("=")
    key = key.lstrip("+")
    if not equals or not key:
        raise UserError(f"{override!r} is not of the form key=value; see heatssl {command} --help")
    known = setting_types(SCHEMAS[command])
    if key in groups(command) and not (value.startswith("{") and command == "pretrain"):
        _check_option(key, value)
        return f"{key}={value}"
    if key.partition(".")[0] in OPEN_SETTINGS and command == "pretrain":
        return _readable(f"++{key}={value}")
    if key not in known:
        raise UserError(f"unknown key {key!r}{_nearest(key, [*known, *groups(command)], command)}")
    if key.startswith("data.") and command != "pretrain" and not _chooses(overrides, "data"):
        raise UserError(f"{key} needs {' or '.join(f'data={name}' for name in options('data'))} beside it")
    refuse_of_training(command, key)
    if _is_text(known[key]) and value != "null":
        return f"{key}={_quoted(value)}"
    return _readable(f"{key}={value}")


def _without_the_recipes(overrides: list[str]) -> list[str]:
    """What takes back a recipe's settings of an objective, a prior or a backbone where another was chosen.

    ``backbone_arguments={...}`` as a whole is all of them, too.
    """
    given = dict(override.lstrip("+").split("=", 1) for override in overrides)
    if "recipe" not in given:
        return []
    recipe = _read("recipe", given["recipe"])
    made_for = {key: option for default in recipe.get("defaults", []) for key, option in default.items()}
    taken_back = []
    for group in ("objective", "prior"):
        option, of_recipe = given.get(group), made_for.get(f"override /{group}")
        if option is None or option.startswith("{") or option == of_recipe:
            continue
        usual = _read(group, option)
        for key in (f"{group}.{key}" for key in recipe.get(group, {})):
            word = key.partition(".")[2]
            if key not in given:
                taken_back.append(f"++{key}={_yaml(usual[word])}" if word in usual else f"~{key}")
    arguments = given.get("backbone_arguments")
    if arguments is not None or given.get("backbone", recipe.get("backbone")) != recipe.get("backbone"):
        said = OverridesParser.create().parse_override(f"x={arguments or '{}'}").value()
        kept = {
            *(said if isinstance(said, dict) else {}),
            *(key.partition(".")[2] for key in given if key.startswith("backbone_arguments.")),
        }
        taken_back += [f"~backbone_arguments.{key}" for key in recipe.get("backbone_arguments", {}) if key not in kept]
    return taken_back


def _read(group: str, option: str) -> dict[str, Any]:
    """What stands in ``configs/<group>/<option>.yaml``."""
    found: dict[str, Any] = (
        yaml.safe_load((config_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")) or {}
    )
    return found


def _check_option(group: str, option: str) -> None:
    check_choice(group, option, options(group), UserError)


def _chooses(overrides: list[str], group: str) -> bool:
    return any(override.startswith(f"{group}=") and override != f"{group}=null" for override in overrides)


def _readable(override: str) -> str:
    """The override itself, when Hydra's grammar reads one value from it."""
    plain = override.lstrip("+")
    try:
        parsed = OverridesParser.create().parse_override(override)
    except HydraException as error:
        raise UserError(f"{plain}: this value cannot be read; put it in quotes, as in \"key='a, b'\"") from error
    if parsed.is_sweep_override():
        key, _, value = plain.partition("=")
        raise UserError(f"{plain}: one value at a time; a list is written {key}=[{value}]")
    return override


def _quoted(text: str) -> str:
    """Text that Hydra takes as it stands: paths may hold spaces, commas, brackets, and start with ~."""
    if len(text) >= 2 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    text = str(Path(text).expanduser()) if text.startswith("~") else text
    return "'" + text.replace("'", "\\'") + "'"


def _nearest(key: str, known: list[str], command: str) -> str:
    """What was probably meant: the same word elsewhere, a similar one beside it, a similar one elsewhere."""
    parent, _, word = key.rpartition(".")
    everywhere = {name.rpartition(".")[2]: name for name in reversed(known)}
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == parent}
    found = everywhere.get(word) or _close(word, beside, cutoff=0.6) or _close(word, everywhere, cutoff=0.7)
    if found:
        return f": did you mean {found!r}?"
    return f": {parent} has {', '.join(beside)}" if parent and beside else f"; heatssl {command} --help lists all"


def _close(word: str, names: dict[str, str], cutoff: float) -> str | None:
    matches = difflib.get_close_matches(word, names, n=1, cutoff=cutoff)
    return names[matches[0]] if matches else None


def _check_data(data: DataConfig | None) -> None:
    if data is None:
        return
    if data.name != "shapes" and not data.root:
        raise UserError(f"data={data.name} needs data.root=PATH")
    for key, values in (("mean", data.mean), ("std", data.std)):
        if len(values) != 3 or not all(map(math.isfinite, values)) or (key == "std" and min(values) <= 0):
            kind = "positive numbers" if key == "std" else "numbers"
            raise UserError(f"data.{key}={values}: give three {kind}, of red, green and blue in [0, 1]")


def _check_group(group: str, settings: dict[str, Any]) -> None:
    """The keys of ``configs/<group>/<name>.yaml`` are the schema, and its values show the types."""
    name = str(settings.get("name"))
    _check_option(group, name)
    defaults = _read(group, name)
    for key, value in settings.items():
        if key not in defaults:
            if group == "prior" and name == "none":
                raise UserError(f"unknown key '{group}.{key}' of prior=none: choose a law first, such as prior=laplace")
            hint = _nearest(f"{group}.{key}", [f"{group}.{known}" for known in defaults], "pretrain")
            raise UserError(f"unknown key '{group}.{key}'{hint}")
        default = defaults[key]
        if default is not None and not _fits(value, type(default)):
            expected = (
                f"{'a list' if isinstance(default, list) else _describe(type(default))}, such as {_yaml(default)}"
            )
            raise UserError(f"{group}.{key}={value}: expected {expected}")


def _check_backbone(arguments: dict[str, Any]) -> None:
    """What every backbone is given already: timm would make the model for other images than it is shown."""
    fixes = {
        "img_size": "set data.image_size instead",
        "num_classes": "leave it out, a backbone ends in features",
        "in_chans": "leave it out, images have three colours",
    }
    for key, fix in fixes.items():
        if key in arguments:
            raise UserError(f"backbone_arguments.{key}={arguments[key]}: {fix}")


def _fits(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, (int, float) if kind is float else kind)


def _explain(command: str, error: BaseException, overrides: list[str]) -> str:
    """One line for what Hydra or OmegaConf tell in many."""
    cause = error
    while cause.__cause__ is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    key = (getattr(cause, "full_key", None) or "").partition("[")[0]
    known = setting_types(SCHEMAS[command])
    if isinstance(cause, ValidationError) and key in known:
        given = next((override for override in reversed(overrides) if override.startswith(f"{key}=")), key)
        return f"{given}: expected {_describe(known[key])}"
    if key and key not in known:
        return f"unknown key {key!r}{_nearest(key, list(known), command)}"
    return (str(cause) or type(cause).__name__).strip().partition(os.linesep)[0]


def _is_text(kind: Any) -> bool:
    return kind is str or (isinstance(kind, types.UnionType) and str in get_args(kind))


def _describe(kind: Any) -> str:
    """A type in the user's words."""
    if isinstance(kind, types.UnionType):
        return " or ".join("null" if part is type(None) else _describe(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return "a list of numbers such as [0.1,0.9]" if get_args(kind) == (float,) else "a list such as [a,b]"
    return EXPECTED.get(get_origin(kind) or kind, "several settings: give them one by one, as key.setting=value")


def _yaml(value: Any) -> str:
    return str(yaml.safe_dump(value, default_flow_style=True)).partition("\n")[0]
