"""Settings that another choice leaves without effect: nobody should believe that they have had one."""

from collections.abc import Iterable
from typing import Any

from heatssl.errors import UserError


def refuse_unused(config: Any, names: Iterable[str], choice: str) -> None:
    """Refuse settings that are not as they are by default, where nothing looks at them.

    Args:
        config: settings of a command, all of which have a default.
        names: of those that are without effect.
        choice: what leaves them so, as it is written on the command line.

    Raises:
        UserError: naming the first of them.
    """
    defaults = type(config)()
    for name in names:
        if getattr(config, name) != getattr(defaults, name):
            raise UserError(f"{name}={getattr(config, name)} has no effect with {choice}: leave it out")
