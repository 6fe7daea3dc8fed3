"""The one exception that users are meant to see, and the hint it gives for a mistyped name."""

import difflib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager


class UserError(Exception):
    """Input that cannot work, told in one line that names the fix; the command line exits with code 2."""


@contextmanager
def permission_errors() -> Iterator[None]:
    """Turn a file or folder that may not be opened into a :class:`UserError` that names it; a decorator as well."""
    try:
        yield
    except PermissionError as error:
        fix = "change its permissions, or name another place"
        raise UserError(f"{error.filename or error} cannot be opened (permission denied): {fix}") from error


def did_you_mean(name: str, known: Iterable[str], cutoff: float = 0.3) -> str:
    """``: did you mean 'x'?`` with the nearest known name, or nothing when none is as alike as ``cutoff``, of 1."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f": did you mean {nearest[0]!r}?" if nearest else ""


def check_choice(what: str, value: str, choices: Collection[str], error: type[Exception] = ValueError) -> None:
    """Refuse what is none of the choices.

    Raises:
        ValueError: naming the nearest and all of them; another ``error`` where one is given.
    """
    if value not in choices:
        hint = did_you_mean(str(value), choices, cutoff=0.6) or ":"
        raise error(f"unknown {what} {value!r}{hint} choose one of {', '.join(choices)}")
