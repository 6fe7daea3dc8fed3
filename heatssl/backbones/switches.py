"""What can be changed in a trained model of heatssl's own, without touching its weights.

A model that timm saves afterwards is made again with the change.
"""

from typing import Any

from torch import nn

from heatssl.backbones.normalisers import Normaliser, NormaliserSettings
from heatssl.backbones.patch_encoder import PatchEncoder
from heatssl.backbones.positions import PositionSettings, RotaryPositions
from heatssl.backbones.timm_records import tell_timm_of_arguments


def set_positions(model: nn.Module, settings: PositionSettings) -> None:
    """Change how a model of rotary positions sees offsets.

    Raises:
        ValueError: when it has no rotary positions.
    """
    arguments = {
        "positions": settings.kind,
        "position_base": settings.base,
        "position_scale": settings.scale,
        "position_window": settings.window,
    }
    _change(model, RotaryPositions, settings, arguments, "no rotary positions")


def set_normaliser(model: nn.Module, settings: NormaliserSettings) -> None:
    """Change how a model's scores become weights.

    Raises:
        ValueError: when it has no such scores.
    """
    arguments = {"normaliser": settings.kind, "length": settings.length, "log_n_at_test": settings.log_n_at_test}
    _change(model, Normaliser, settings, arguments, "no normaliser to change")


def _change(
    model: nn.Module,
    part: type[RotaryPositions] | type[Normaliser],
    settings: PositionSettings | NormaliserSettings,
    arguments: dict[str, Any],
    lack: str,
) -> None:
    found = [module for module in model.modules() if isinstance(module, part)]
    if not found:
        raise ValueError(f"{type(model).__name__} has {lack}: choose a gau_*, flash_* or roformer_v2_* model")
    for module in found:
        module.change(settings)  # type: ignore[arg-type]  # the callers above pair them
    for encoder in model.modules():
        if isinstance(encoder, PatchEncoder):
            tell_timm_of_arguments(encoder, **arguments)
