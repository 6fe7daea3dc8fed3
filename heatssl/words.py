"""Words of a command line as settings: ``run1 run2 --suite full`` is ``sources=[run1,run2] suite=full``.

Settings are ``key=value`` everywhere; ``--key value`` and ``--key=value`` say the same, and where a command is about a
list of things, these may stand there as they are.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import get_origin

from heatssl.config import SCHEMAS, PretrainConfig, setting_types
from heatssl.config_folder import groups
from heatssl.errors import UserError

LISTS = {"evaluate": "sources", "attribute": "images"}  # what plain words are, by command
SAME = {"attribute": {"model": "run", "method": "methods"}}  # other names of settings, by command
_SETTING = re.compile(r"\+{0,2}~?[a-z_][a-z_0-9.]*=")


def settings(command: str, words: Iterable[str]) -> list[str]:
    """``key=value`` for each setting, in the order of the words; the list of plain words last.

    Raises:
        UserError: on an option without a value, or a plain word where the command takes none.
    """
    found, plain = [], []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if word.startswith("--"):
            found.append(_renamed(command, _option(command, word, rest)))
        elif _SETTING.match(word) and not _is_path(command, word):
            found.append(_renamed(command, word))
        else:
            plain.append(word)
    for other, name in SAME.get(command, {}).items():
        if sum(setting.startswith(f"{name}=") for setting in found) > 1:
            raise UserError(f"{other} and {name} name the same thing, once is enough")
    if not plain:
        return found
    if command not in LISTS:
        raise UserError(f"{plain[0]!r} is not of the form key=value; see heatssl {command} --help")
    if any(setting.startswith(f"{LISTS[command]}=") for setting in found):
        raise UserError(f"{plain[0]!r} and {LISTS[command]}=... name the same things: use one of them")
    return [*found, f"{LISTS[command]}=[{','.join(map(_quoted, plain))}]"]


def _is_path(command: str, word: str) -> bool:
    """Whether a word that looks like a setting names a file, and no setting of a command that takes files."""
    if command not in LISTS or not Path(word).exists():
        return False
    known = {*setting_types(SCHEMAS[command]), *SAME.get(command, {}), *groups(command)}
    return word.partition("=")[0] not in known


def _option(command: str, word: str, rest: list[str]) -> str:
    """``--learning-rate 0.1`` is ``learning_rate=0.1``, ``--score`` ``score=true``, ``--ignore 3`` ``ignore=[3]``.

    Its value is taken off ``rest``.
    """
    name, equals, value = word.removeprefix("--").partition("=")
    name = name.replace("-", "_")
    kind = setting_types(SCHEMAS.get(command, PretrainConfig)).get(SAME.get(command, {}).get(name, name))
    if not equals:
        if kind is bool and rest[:1] not in (["true"], ["false"]):
            return f"{name}=true"
        if not rest:
            raise UserError(f"--{name} needs a value; see heatssl {command} --help")
        value = rest.pop(0)
    if get_origin(kind) is list and not value.startswith("["):
        value = f"[{value}]"
    return f"{name}={value}"


def _renamed(command: str, setting: str) -> str:
    name, equals, value = setting.partition("=")
    return f"{SAME.get(command, {}).get(name, name)}{equals}{value}"


def _quoted(text: str) -> str:
    """One word of a list, as Hydra's grammar reads it."""
    return "'" + text.replace("'", "\\'") + "'"
