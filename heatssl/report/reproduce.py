"""The commands that make a run and its numbers again, from its resolved configuration alone."""

import re
import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from heatssl.config_file import flatten

BOOKKEEPING = {"output", "resume"}  # where a run is written does not change it
GROUPS = {
    "data.name": "data",
    "objective.name": "objective",
    "prior.name": "prior",
}  # choosing a group's file brings in its own keys
OPEN = ("backbone_arguments.", "objective.", "prior.")  # values of any type: text among them needs quotes
PLAIN = re.compile(r"(?!(?:null|true|false)$)[a-z_][a-z0-9_./:-]*", re.IGNORECASE)  # needs no quotes in Hydra


def pretrain_command(config: dict[str, Any], output: str) -> str:
    """``heatssl pretrain`` with every setting written out, so that it holds whatever the defaults become."""
    words = ["heatssl pretrain", shlex.quote(f"output={output}")]
    settings = flatten(config)
    for key in sorted(settings, key=lambda key: key not in GROUPS):
        value = settings[key]
        if key not in BOOKKEEPING:
            is_text = isinstance(value, str) and not key.startswith(OPEN)
            words.append(shlex.quote(f"{GROUPS.get(key, key)}={value if is_text else literal(value)}"))
    return " \\\n    ".join(words)


def follow_up_commands(run: str | Path, seed: object = None, heads: Iterable[str] = ()) -> dict[str, str]:
    """What adds the other sections to a report, by sub-command or head of the probe; the default seed is left out."""
    target, seeded = shlex.quote(f"run={run}"), f" seed={seed}" if seed else ""
    commands = {"probe": f"heatssl probe {target}{seeded}"}
    commands |= {head: f"heatssl probe {target} head={head}{seeded}" for head in heads}
    commands["knn"] = f"heatssl knn {target}{seeded}"
    return commands | {name: f"heatssl {name} {target}" for name in ("attribute", "report")}


def literal(value: Any) -> str:
    """A value in Hydra's override grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return "[" + ",".join(map(literal, value)) + "]"
    if isinstance(value, str) and not PLAIN.fullmatch(value):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return str(value)
