"""Record what a recipe's healthy runs look like: python tools/expected.py NAME RUN RUN RUN [...].

Writes configs/recorded_runs/NAME.yaml from the metrics of finished runs that differ in their seed alone. A band is the
mean over runs plus and minus three standard deviations, at least 5 % of the mean: of three runs the extremes
alone would be too narrow.
"""

import json
import sys
from pathlib import Path
from statistics import mean, stdev

import torch
import yaml

from heatssl.config_file import load_config
from heatssl.config_folder import config_folder
from heatssl.evaluation.results import commit, hardware
from heatssl.expected import KEYS, settings_of


def main(name: str, folders: list[Path]) -> None:
    """Read the runs, hold their settings against each other, write the bands."""
    configs = [load_config(folder / "config.yaml") for folder in folders]
    settings = settings_of(configs[0])
    for folder, config in zip(folders, configs, strict=True):
        if settings_of(config) != settings:
            sys.exit(
                f"{folder} was made with other settings than {folders[0]}: give runs that differ in their seed only"
            )
    metrics = [[json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()] for folder in folders]
    bands = {key: band(metrics, key) for key in KEYS}
    recorded = {
        "runs": len(folders),
        "seeds": [config.seed for config in configs],
        "hardware": hardware(torch.device("cpu")),
        "commit": commit(),
        "settings": settings,
        "bands": {key: rows for key, rows in bands.items() if rows},
    }
    path = config_folder() / "recorded_runs" / f"{name}.yaml"
    path.parent.mkdir(exist_ok=True)
    text = yaml.safe_dump(recorded, sort_keys=False, default_flow_style=None, width=120)
    path.write_text(
        f"# What recorded runs of this recipe looked like: step, lowest, highest. Made by tools/expected.py.\n{text}"
    )
    print(f"-> {path}")


def band(metrics: list[list[dict[str, float]]], key: str) -> list[list[float]]:
    """(step, lowest, highest) at every step where all runs have the figure."""
    runs = [{line["step"]: line[key] for line in lines if key in line} for lines in metrics]
    rows = []
    for step in sorted(set.intersection(*(set(run) for run in runs))):
        values = [run[step] for run in runs]
        reach = max(3 * stdev(values), 0.05 * abs(mean(values)))
        rows.append([step, float(f"{max(mean(values) - reach, 0):.4g}"), float(f"{mean(values) + reach:.4g}")])
    return rows


if __name__ == "__main__":
    if len(sys.argv) < 4:
        sys.exit(__doc__)
    main(sys.argv[1], [Path(folder) for folder in sys.argv[2:]])
