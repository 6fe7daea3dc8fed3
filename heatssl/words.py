"""Words of a command line as settings: ``run1 run2 --suite full`` is ``sources=[run1,run2] suite=full``.

Settings are ``key=value`` everywhere; ``--key value`` and ``--key=value`` say the same, and where a command is about a
list of things, these may stand there as they are.
"""

import re
from collections.abc import Iterable, Iterator

from heatssl.errors import UserError

LISTS = {"evaluate": "sources", "attribute": "images"}  # what plain words are, by command
_SETTING = re.compile(r"\+{0,2}~?[a-z_][a-z_0-9.]*=")


def settings(command: str, words: Iterable[str]) -> list[str]:
    """``key=value`` for each setting, in the order of the words; the list of plain words last.

    Raises:
        UserError: on an option without a value, or a plain word where the command takes none.
    """
    found, plain = [], []
    rest = iter(words)
    for word in rest:
        if word.startswith("--"):
            found.append(_option(command, word, rest))
        elif _SETTING.match(word):
            found.append(word)
        else:
            plain.append(word)
    if not plain:
        return found
    if command not in LISTS:
        raise UserError(f"{plain[0]!r} is not of the form key=value; see heatssl {command} --help")
    if any(setting.startswith(f"{LISTS[command]}=") for setting in found):
        raise UserError(f"{plain[0]!r} and {LISTS[command]}=... name the same things: use one of them")
    return [*found, f"{LISTS[command]}=[{','.join(map(_quoted, plain))}]"]


def _option(command: str, word: str, rest: Iterator[str]) -> str:
    """``--learning-rate 0.1`` is ``learning_rate=0.1``."""
    name, equals, value = word.removeprefix("--").partition("=")
    if not equals:
        following = next(rest, None)
        if following is None:
            raise UserError(f"--{name} needs a value; see heatssl {command} --help")
        value = following
    return f"{name.replace('-', '_')}={value}"


def _quoted(text: str) -> str:
    """One word of a list, as Hydra's grammar reads it."""
    return "'" + text.replace("'", "\\'") + "'"
