"""Settings that another choice leaves without effect: nobody should believe that they have had one."""

from collections.abc import Iterable
from typing import Any

from heatssl.errors import UserError

# Settings of data=... that belong to training; an evaluation shows images as the weights were trained to see them.
_OF_TRAINING = {
    "data.crop_scale": "it crops no image at random",
    "data.flip": "it flips no image at random",
    "data.colour_jitter": "it changes no colours",
    "data.grey": "it changes no colours",
    "data.image_size": "set image_size instead",
    "data.mean": "weights come with their normalisation",
    "data.std": "weights come with their normalisation",
    "data.workers": "set workers instead",
}
_USED = {("finetune", "data.flip")}
_INSTEAD = {
    ("finetune", "data.crop_scale"): "set crop_scale instead",
    ("detect", "data.flip"): "set flip instead",
    ("probe", "data.crop_scale"): "protocol=mae has crops of its own",
    ("probe", "data.flip"): "protocol=mae always flips",
}


def refuse_of_training(command: str, key: str) -> None:
    """Refuse a setting of the images that an evaluation does not look at.

    Args:
        command: any.
        key: given on its command line. What a run brings along is none of the user's wishes, and stays unread.

    Raises:
        UserError: naming what to do instead.
    """
    if command != "pretrain" and key in _OF_TRAINING and (command, key) not in _USED:
        reason = _INSTEAD.get((command, key), _OF_TRAINING[key])
        raise UserError(f"{key} has no effect with {command}, {reason}: leave it out")


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
