"""Is my run healthy? Bands of loss, kNN and RankMe, step by step, from recorded runs of the same recipe.

``configs/recorded_runs/<recipe>.yaml`` holds them; ``tools/expected.py`` writes it from run folders. They are shown
only beside a run of the very settings that were recorded, whatever its seed and the place of its data.
"""

import dataclasses
from dataclasses import dataclass
from typing import Any

import yaml

from heatssl.config import KEEPS_RESULT, PretrainConfig
from heatssl.config_file import MISSING, flatten
from heatssl.config_folder import config_folder

Band = tuple[float, float]  # lowest and highest
KEYS = ("train/loss", "knn/accuracy", "health/rankme")
_OF_THE_BANDS = {"trainer.knn_train_size", "trainer.knn_val_size"}  # kNN in another bank is another figure
MAY_DIFFER = KEEPS_RESULT - _OF_THE_BANDS | {"seed", "data.root", "expected"}


@dataclass(frozen=True)
class Expected:
    """Bands of recorded runs: for each of ``KEYS`` the steps, ascending, with their lowest and highest values."""

    runs: int
    bands: dict[str, list[tuple[float, float, float]]]

    def at(self, key: str, step: float) -> Band | None:
        """The band of a figure at a step, interpolated between recorded ones; None outside of them."""
        rows = self.bands.get(key, [])
        for (before, *low_high), (after, *next_low_high) in zip(rows, rows[1:] or rows, strict=False):
            if before <= step <= after:
                share = (step - before) / max(after - before, 1)
                low, high = (a + share * (b - a) for a, b in zip(low_high, next_low_high, strict=True))
                return low, high
        return None

    def line(self, key: str) -> list[tuple[float, float, float]]:
        """All of a figure's (step, lowest, highest), for a chart."""
        return self.bands.get(key, [])


def recorded_recipes() -> list[str]:
    """Names that ``expected`` can take."""
    return sorted(path.stem for path in (config_folder() / "recorded_runs").glob("*.yaml"))


def expected_of(config: PretrainConfig) -> Expected | None:
    """The bands that ``config.expected`` names, None where it names none or its recorded settings are others."""
    if config.expected is None:
        return None
    path = config_folder() / "recorded_runs" / f"{config.expected}.yaml"
    if not path.is_file():
        return None
    recorded = yaml.safe_load(path.read_text(encoding="utf-8"))
    here = settings_of(config)
    if any(here.get(key, MISSING) != recorded["settings"].get(key, MISSING) for key in {*here, *recorded["settings"]}):
        return None
    return Expected(recorded["runs"], {key: [tuple(row) for row in rows] for key, rows in recorded["bands"].items()})


def settings_of(config: PretrainConfig) -> dict[str, Any]:
    """What makes the result, in dotted keys, but for the seed and the place of the data."""
    settings = flatten(dataclasses.asdict(config))
    return {key: value for key, value in settings.items() if key not in MAY_DIFFER}
