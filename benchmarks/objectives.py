"""Benchmark A: every objective for the same wall-clock, with the same encoder, on the same machine.

python benchmarks/objectives.py --data shapes                                   # anybody's: generated scenes
python benchmarks/objectives.py --data imagenette --root imagenette96.tar --minutes 10 --seeds 0 1 2

Every run is measured for some steps first and then gets as many steps as fit the minutes, so that its schedule ends
with the time. Accuracies are those of a held-out tenth of train unless --final asks for val. One row a run is added
to benchmarks/results/objectives.jsonl; --table prints what stands there.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch

from heatssl.evaluation.results import commit, hardware

RESULTS = Path(__file__).parent / "results" / "objectives.jsonl"
SCRATCH = Path("runs/benchmark")
CALIBRATION_STEPS = 24
BATCH = 128
HELD_OUT = 0.1
ENCODER = [
    "backbone=vit_tiny_patch16_224",
    "backbone_arguments={patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4}",
]
RECIPE = ["optimizer.learning_rate=2e-3", "optimizer.warmup_steps=50"]  # the same for all: not tuned for each
LIGHT = ["objective.decoder_width=128", "objective.decoder_heads=4"]
OBJECTIVES: dict[str, list[str]] = {
    "heat_jepa": ["objective=heat_jepa"],
    "heat_jepa, no law": ["objective=heat_jepa", "objective.transport=false"],
    "heat_completion": ["objective=heat_completion"],
    "heat_completion, no law": ["objective=heat_completion", "objective.transport=false"],
    "qb_heat": ["objective=qb_heat", "objective.visible_weight=1.0"],
    "mae, light decoder": ["objective=mae", *LIGHT, "objective.decoder_depth=1"],
    "mae, 4 blocks": ["objective=mae", *LIGHT, "objective.decoder_depth=4"],
    "simmim": ["objective=simmim"],
    "simclr": ["objective=simclr"],
    "lejepa": ["objective=lejepa"],
}


def main() -> None:
    """Run what was asked for, one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("shapes", "imagenette"), default="shapes")
    parser.add_argument("--root", help="imagenette96.tar or a folder of the same layout")
    parser.add_argument("--minutes", type=float, default=10.0, help="of pretraining, for each run")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="%(default)s")
    parser.add_argument(
        "--settings", nargs="*", default=[], help="more settings of pretrain: a trial, told apart by them"
    )
    parser.add_argument("--final", action="store_true", help="measure on val, for a figure that will be reported")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    if not arguments.table:
        for seed in arguments.seeds:
            for name in arguments.objectives:
                row = run(name, seed, arguments)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


def run(name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and evaluate once; the row that is kept."""
    settings = [*OBJECTIVES[name], *ENCODER, *data_settings(arguments), *arguments.settings]
    settings += [f"seed={seed}", f"trainer.batch_size={BATCH}", "trainer.knn_every=0", "resume=never", *RECIPE]
    rate = pretrain(settings, CALIBRATION_STEPS, log_every=4)["images_per_second"]
    steps = max(CALIBRATION_STEPS, round(60 * arguments.minutes * rate / BATCH))
    measured = pretrain(settings, steps)
    for command in ("probe", "knn"):
        heatssl(command, [f"run={SCRATCH}", f"seed={seed}", "random_init=false"])
    evaluation = json.loads((SCRATCH / "evaluation.json").read_text())["results"]
    accuracies = {result["metric"]: result["accuracy"] for result in evaluation}
    return {
        "data": arguments.data,
        "objective": name,
        "settings": [*OBJECTIVES[name], *arguments.settings],
        "seed": seed,
        "minutes": arguments.minutes,
        "split": evaluation[0]["split"],
        **accuracies,
        "steps": steps,
        "images_seen": steps * BATCH,
        **measured,
        "hardware": hardware(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
        "commit": commit(),
    }


def data_settings(arguments: argparse.Namespace) -> list[str]:
    """The data set, and what stands in for val."""
    held_out = 0 if arguments.final else HELD_OUT
    if arguments.data == "shapes":
        return ["data=shapes", "data.crop_scale=[0.6,1.0]", f"data.held_out={held_out}"]
    return ["data=tar", f"data.root={arguments.root}", "data.image_size=64", f"data.held_out={held_out}"]


def pretrain(settings: list[str], steps: int, log_every: int = 20) -> dict[str, Any]:
    """Pretrain from scratch; seconds, peak memory and the last health figures."""
    shutil.rmtree(SCRATCH, ignore_errors=True)
    started = time.perf_counter()
    peak = heatssl(
        "pretrain", [*settings, f"trainer.steps={steps}", f"trainer.log_every={log_every}", f"output={SCRATCH}"]
    )
    seconds = time.perf_counter() - started
    lines = [json.loads(line) for line in (SCRATCH / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "train/images_per_second" in line]
    return {
        "seconds": round(lines[-1]["seconds"], 1),  # of training, as the run itself counts them
        "wall_seconds": round(seconds, 1),  # start-up and writing included
        "images_per_second": round(median(line["train/images_per_second"] for line in training[1:]), 1),
        "peak_memory_mib": peak,
        **{key: round(value, 4) for key, value in training[-1].items() if key.startswith(("health/", "train/loss"))},
    }


def heatssl(command: str, settings: list[str]) -> int:
    """Run one command in a process of its own; the peak of its memory in MiB."""
    process = subprocess.Popen([sys.executable, "-m", "heatssl.cli", command, *settings], stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"heatssl {command} {' '.join(settings)} failed")
    return usage.ru_maxrss // 1024


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each objective and settings, mean and extremes over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (row["data"], row["minutes"], row["split"], row["objective"], " ".join(row["settings"]))
        groups.setdefault(key, []).append(row)
    lines = [
        "| data | minutes | split | objective | settings | linear | kNN | img/s | RankMe | seeds |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, group in sorted(groups.items(), key=lambda item: (item[0][:3], -mean(row["linear"] for row in item[1]))):
        figures = [spread([100 * row[metric] for row in group]) for metric in ("linear", "knn")]
        rate, rank = (mean(row[name] for row in group) for name in ("images_per_second", "health/rankme"))
        cells = [*map(str, key), *figures, f"{rate:.0f}", f"{rank:.0f}", str(len(group))]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and the extremes where there are several."""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
