"""The YAML files that ship with the package: where they are, which groups a command has, what they offer.

Read by pattern, not by a YAML parser, so that ``--help`` stays fast.
"""

import re
from pathlib import Path

from heatssl.errors import UserError


def config_folder() -> Path:
    """``configs`` of an installed package, or of the checkout that the package is used from.

    Raises:
        UserError: when neither is there.
    """
    package = Path(__file__).resolve().parent
    for folder in (package / "configs", package.parent / "configs"):
        if (folder / "pretrain.yaml").is_file():
            return folder
    raise UserError(f"{package} has no configs: install heatssl again, with pip install --force-reinstall heatssl")


def groups(command: str) -> list[str]:
    """Groups that ``configs/<command>.yaml`` chooses from, such as ``data`` and ``recipe``."""
    text = (config_folder() / f"{command}.yaml").read_text(encoding="utf-8")
    return re.findall(r"^ *- (\w+): ", text, flags=re.MULTILINE)


def options(group: str) -> list[str]:
    """File names that can be chosen for a group, ``shapes`` for ``configs/data/shapes.yaml``."""
    return sorted(path.stem for path in (config_folder() / group).glob("*.yaml"))


def first_remark(group: str, option: str) -> str:
    """The first comment of an option's file that is not a Hydra directive."""
    text = (config_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    remarks = re.findall(r"^# (?!@)(.*)$", text, flags=re.MULTILINE)
    return remarks[0].rstrip(".") if remarks else ""


def remarked_settings(group: str, option: str) -> list[tuple[str, str, str]]:
    """(key, value, comment behind it) of an option's top-level settings."""
    text = (config_folder() / group / f"{option}.yaml").read_text(encoding="utf-8")
    return re.findall(r"^(\w+): (.*?)(?: # (.*))?$", text, flags=re.MULTILINE)
