"""What no objective can have, whatever it is: widths below one, negative weights, numbers that are none."""

import math
from collections.abc import Mapping
from typing import Any

# Least value of the settings that several objectives share by name; null stands for an objective's own default.
LEAST: dict[str, int] = {
    "channels": 1,
    "commutator_weight": 0,
    "decoder_depth": 0,
    "decoder_heads": 1,
    "decoder_width": 1,
    "embedding_width": 1,
    "head_width": 1,
    "mask_unit": 1,
    "painter_width": 0,
    "projector_depth": 1,
    "visible_weight": 0,
}


def check_limits(settings: Mapping[str, Any]) -> None:
    """Refuse values that torch would not, or only in the middle of its own code.

    Args:
        settings: an objective's or a prior's, by name.

    Raises:
        ValueError: on the first such value.
    """
    for name, value in settings.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{name}={value} is no number: give one")
        least = LEAST.get(name)
        if least is None or value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(f"{name}={value} is no number: give {least} or more")
        if isinstance(value, float) and not name.endswith("weight"):
            raise ValueError(f"{name}={value} must be a whole number")
        if value < least:
            raise ValueError(f"{name}={value} must be {least} or more")
