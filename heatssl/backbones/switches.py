"""What can be changed in a trained model of heatssl's own, without touching its weights."""

from torch import nn

from heatssl.backbones.normalisers import Normaliser, NormaliserSettings
from heatssl.backbones.positions import PositionSettings, RotaryPositions


def set_positions(model: nn.Module, settings: PositionSettings) -> None:
    """Change how a model of rotary positions sees offsets.

    Raises:
        ValueError: when it has no rotary positions.
    """
    _change(model, RotaryPositions, settings, "no rotary positions")


def set_normaliser(model: nn.Module, settings: NormaliserSettings) -> None:
    """Change how a model's scores become weights.

    Raises:
        ValueError: when it has no such scores.
    """
    _change(model, Normaliser, settings, "no normaliser to change")


def _change(
    model: nn.Module,
    part: type[RotaryPositions] | type[Normaliser],
    settings: PositionSettings | NormaliserSettings,
    lack: str,
) -> None:
    found = [module for module in model.modules() if isinstance(module, part)]
    if not found:
        raise ValueError(f"{type(model).__name__} has {lack}: choose a gau_*, flash_* or roformer_v2_* model")
    for module in found:
        module.change(settings)  # type: ignore[arg-type]  # the callers above pair them
