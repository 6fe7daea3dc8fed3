"""Benchmarks A and B: every objective for the same time, with the same encoder, on the same machine.

python benchmarks/objectives.py --data shapes                                   # anybody's: generated scenes
python benchmarks/objectives.py --data imagenette --root imagenette96.tar --minutes 10 --seeds 0 1 2
python benchmarks/objectives.py --data imagenette --root imagenette96.tar --accelerator gpu       # B

A, on a CPU, has small encoders and 64 pixels; B, on one GPU, has ViT-S/8 or its GAU twin, 96 pixels and bfloat16, and
its minutes are those of the clock on the wall. Runs of B that share a GPU say so: --side-by-side.

The minutes of A are those of two cores: a run of 10 gets 20 minutes of one thread, reading and cropping images
included. Counted is the process's own time, not the clock on the wall, so that two of these scripts can run side by
side and a busy machine changes nothing but how long it takes. Every run is measured for some steps first and then gets
as many steps as fit, so that its schedule ends with the time. With --on-the-way 8 kNN is looked at every eighth of
the way, over 4,000 images of train and 900 others of it; that takes time of its own, which is not counted. Accuracies
are those of a held-out tenth of train, linear and kNN alone, unless --final asks for val. One row a run is added to
benchmarks/results/objectives.jsonl; --table prints what stands there.
"""

import argparse
import itertools
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf

from heatssl.evaluation.results import commit, hardware

RESULTS = Path(__file__).parent / "results" / "objectives.jsonl"
CALIBRATION_STEPS = (4, 28)  # the difference leaves the start out
CALIBRATION_SHARE = 0.05  # of a run, which is measured once those few steps have told how long that is
GPU_STEPS = 60  # whose second half is counted
LOOK = ["trainer.knn_train_size=4000", "trainer.knn_val_size=900"]
CORES = 2  # whose minutes are meant
HELD_OUT = 0.1
UNITS = "patch_size: 8, embed_dim: 128, depth: 8, key_width: 32"  # two of them for each block
ALPHA = "norm_place: post, value_activation: silu"  # as GAU-alpha
BLOCKS = "patch_size: 8, embed_dim: 128, depth: 4, num_heads: 4"
ENCODERS: dict[str, list[str]] = {  # of the same parameters within 5 %
    "resnet": [  # convolutions mix tokens: only for objectives that encode whole images or quarters, such as qb_heat
        "backbone=resnet10t",
        "backbone_arguments={output_stride: 8, channels: [24, 48, 96, 216]}",
    ],
    "vit": ["backbone=vit_tiny_patch16_224", f"backbone_arguments={{{BLOCKS}}}"],
    "roformer_v2": ["backbone=roformer_v2_small_patch16_224", f"backbone_arguments={{{BLOCKS}}}"],
    "gau, linear values": ["backbone=gau_tiny_patch16_224", f"backbone_arguments={{{UNITS}}}"],
    "flash": ["backbone=flash_small_patch16_224", f"backbone_arguments={{{UNITS}, chunk: 4}}"],
    **{
        f"gau, {normaliser}": [
            "backbone=gau_tiny_patch16_224",
            f"backbone_arguments={{{UNITS}, {ALPHA}, normaliser: {normaliser}}}",
        ]
        for normaliser in ("softmax_plus", "softmax", "relu2", "relu2_fixed")
    },
}
SMALL: dict[str, list[str]] = {  # Benchmark B
    "vit": ["backbone=vit_small_patch16_224", "backbone_arguments={patch_size: 8}"],
    "gau, linear values": ["backbone=gau_small_patch16_224", "backbone_arguments={patch_size: 8}"],
}
RECIPE = ["optimizer.name=muon", "optimizer.learning_rate=8e-3", "optimizer.warmup_steps=50"]  # the same for all
RECIPE += ["trainer.batch_size=128"]  # but for those below that do better with another
LIGHT = ["objective.decoder_width=128", "objective.decoder_heads=4"]
QUARTERS = ["objective=heat_jepa", "objective.crops=2", "objective.temperature=0.1", "trainer.batch_size=64"]
METRICS = {"linear": "linear", "knn": "kNN", "attentive": "attentive", "block": "one block"}
COMMANDS = {name: ("knn",) if name == "knn" else ("probe", f"head={name}") for name in METRICS}
OBJECTIVES: dict[str, list[str]] = {
    "heat_jepa": [*QUARTERS, "objective.transport=false", "objective.visible_ratio=0.25"],
    "heat_jepa, transport": [*QUARTERS, "objective.transport=true", "objective.visible_ratio=0.25"],
    "heat_completion": ["objective=heat_completion"],
    "heat_completion, no transport": ["objective=heat_completion", "objective.transport=false"],
    "qb_heat": ["objective=qb_heat", "objective.visible_weight=1.0"],
    "finola": ["objective=finola"],
    "mae, light decoder": ["objective=mae", *LIGHT, "objective.decoder_depth=1", "trainer.batch_size=64"],
    "mae, 4 blocks": ["objective=mae", *LIGHT, "objective.decoder_depth=4"],
    "simmim": ["objective=simmim"],
    "simclr": ["objective=simclr"],
    "lejepa": ["objective=lejepa"],
}
PAINTERS = ("heat_completion", "qb_heat", "finola", "mae")  # plain pixels on the scenes: all do better (docs/recipe.md)


def main() -> None:
    """Run what was asked for, one after the other, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=("shapes", "imagenette"), default="shapes")
    parser.add_argument("--root", help="imagenette96.tar or a folder of the same layout")
    parser.add_argument("--minutes", type=float, default=10.0, help="of two cores, for each run's pretraining")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--objectives", nargs="+", choices=OBJECTIVES, default=list(OBJECTIVES))
    parser.add_argument(
        "--settings", nargs="*", default=[], help="more settings of pretrain: a trial, told apart by them"
    )
    parser.add_argument("--encoders", nargs="+", choices=ENCODERS, default=["vit"])
    parser.add_argument("--keep", type=Path, help="a folder in which run folders stay")
    parser.add_argument("--final", action="store_true", help="measure on val, for a figure that will be reported")
    parser.add_argument("--metrics", nargs="+", choices=METRICS, help="all with --final, else linear and knn")
    parser.add_argument("--on-the-way", type=int, default=0, metavar="LOOKS", help="at kNN, for a line over time")
    parser.add_argument("--accelerator", choices=("cpu", "gpu"), default="cpu", help="cpu: A; gpu: B")
    parser.add_argument("--batch", type=int, default=512, help="images of a step of B, the same for all (%(default)s)")
    parser.add_argument("--side-by-side", type=int, default=1, help="runs that share the GPU, for the record")
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    arguments = parser.parse_args()
    missing = set(arguments.encoders) - set(SMALL)
    if arguments.accelerator == "gpu" and missing:
        parser.error(f"Benchmark B has no encoder {', '.join(sorted(missing))}: choose {' or '.join(SMALL)}")
    if not arguments.table:
        for seed in arguments.seeds:
            for encoder, name in itertools.product(arguments.encoders, arguments.objectives):
                row = run(name, encoder, seed, arguments)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
                print(json.dumps(row), flush=True)
    print(table([json.loads(line) for line in RESULTS.read_text().splitlines()]))


def run(name: str, encoder: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Pretrain and evaluate once; the row that is kept."""
    pixels = ["objective.target=plain"] if arguments.data == "shapes" and name.startswith(PAINTERS) else []
    chosen = [*OBJECTIVES[name], *pixels, *arguments.settings]
    on_gpu = arguments.accelerator == "gpu"
    encoders = SMALL if on_gpu else ENCODERS
    settings = [*RECIPE, *encoders[encoder], *data_settings(arguments), f"seed={seed}", *chosen]
    settings += ["trainer.knn_every=0", "resume=never", f"trainer.accelerator={arguments.accelerator}"]
    if on_gpu:
        workers = max(1, ((os.cpu_count() or 2) - 1) // arguments.side_by_side)
        settings += [f"trainer.batch_size={arguments.batch}", "trainer.precision=bf16", f"data.workers={workers}"]
    else:
        settings += ["data.workers=0"]
    with tempfile.TemporaryDirectory() as folder:
        run_folder = Path(folder) / "run"
        if arguments.keep:
            run_folder = arguments.keep / re.sub(
                r"[^a-z0-9]+", "_", f"{name}_{encoder}_{seed}_{'_'.join(arguments.settings)}"
            )
        seconds = 60 * (1 if on_gpu else CORES) * arguments.minutes
        if on_gpu:
            seconds_per_step = seconds_on_gpu(settings, run_folder)
        else:
            seconds_per_step = seconds_of_core(settings, run_folder, CALIBRATION_SHARE * seconds)
        steps = max(CALIBRATION_STEPS[1], round(seconds / seconds_per_step))
        looks = [f"trainer.knn_every={steps // arguments.on_the_way}", *LOOK] if arguments.on_the_way else []
        measured = pretrain([*settings, *looks], steps, run_folder)
        batch = OmegaConf.load(run_folder / "config.yaml").trainer.batch_size
        for metric in arguments.metrics or (METRICS if arguments.final else ("linear", "knn")):
            command, *head = COMMANDS[metric]
            heatssl(command, [f"run={run_folder}", f"seed={seed}", "random_init=false", *head])
        on_the_way = [
            [round(line["step"] * seconds_per_step, 1), line["knn/accuracy"]]
            for line in metrics(run_folder)
            if "knn/accuracy" in line
        ]
        evaluation = json.loads((run_folder / "evaluation.json").read_text())["results"]
        pictures = np.load(run_folder / "pictures.npz")
        residual = float(pictures["law_residual"].mean()) if "law_residual" in pictures.files else None
    accuracies = {result["metric"]: result["accuracy"] for result in evaluation}
    return {
        "data": arguments.data,
        "objective": name,
        "encoder": encoder,
        "settings": chosen,
        "seed": seed,
        "minutes": arguments.minutes,
        "split": evaluation[0]["split"],
        **accuracies,
        "law_residual": residual,  # mean over the run's eight pictures, images that were not trained on
        "steps": steps,
        "images_seen": steps * batch,
        "images_per_second" if on_gpu else "images_per_core_second": round(batch / seconds_per_step, 1),
        **({"side_by_side": arguments.side_by_side} if on_gpu else {}),
        **measured,
        **({"knn_on_the_way": on_the_way} if on_the_way else {}),
        "hardware": hardware(torch.device("cuda" if on_gpu else "cpu")),
        "torch": torch.__version__,
        "commit": commit(),
    }


def seconds_of_core(settings: list[str], folder: Path, seconds: float) -> float:
    """Of one step, by the process's own time; over about so many seconds, as what runs beside it comes and goes."""
    few, more = CALIBRATION_STEPS
    started, some = (pretrain(settings, steps, folder)["cpu_seconds"] for steps in CALIBRATION_STEPS)
    per_step = (some - started) / (more - few)
    many = round(seconds / per_step)
    if many <= more:
        return per_step
    return (pretrain(settings, many, folder)["cpu_seconds"] - started) / (many - few)


def seconds_on_gpu(settings: list[str], folder: Path) -> float:
    """Of one step, by the clock, once the first have compiled and filled what they need."""
    pretrain(settings, GPU_STEPS, folder)
    halfway, *_, end = metrics(folder)
    return (end["seconds"] - halfway["seconds"]) / (end["step"] - halfway["step"])


def data_settings(arguments: argparse.Namespace) -> list[str]:
    """The data set, and what stands in for val."""
    held_out = 0 if arguments.final else HELD_OUT
    if arguments.data == "shapes":
        return ["data=shapes", "data.crop_scale=[0.6,1.0]", f"data.held_out={held_out}"]
    return [
        "data=tar",
        f"data.root={arguments.root}",
        f"data.image_size={96 if arguments.accelerator == 'gpu' else 64}",
        "data.crop_scale=[0.2,1.0]",
        f"data.held_out={held_out}",
    ]


def pretrain(settings: list[str], steps: int, folder: Path) -> dict[str, Any]:
    """Pretrain from scratch; seconds of the processor, peak memory, and the last loss and health figures."""
    shutil.rmtree(folder, ignore_errors=True)
    log_every = max(1, min(20, steps // 2))
    started = time.perf_counter()
    usage = heatssl(
        "pretrain", [*settings, f"trainer.steps={steps}", f"trainer.log_every={log_every}", f"output={folder}"]
    )
    training = next(line for line in reversed(metrics(folder)) if "train/loss" in line)
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),  # start-up and writing included
        "wall_seconds": round(time.perf_counter() - started, 1),
        "peak_memory_mib": usage.ru_maxrss // 1024,
        **{key: round(value, 4) for key, value in training.items() if key.startswith(("health/", "train/loss"))},
    }


def metrics(folder: Path) -> list[dict[str, Any]]:
    """What a run wrote down on its way, the first first."""
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def heatssl(command: str, settings: list[str]) -> resource.struct_rusage:
    """Run one command in a process of its own, on one thread unless the environment says otherwise; what it used."""
    words = [sys.executable, "-m", "heatssl.cli", command, *settings]
    environment = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **os.environ}
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"heatssl {command} {' '.join(settings)} failed")
    return usage


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, one line for each objective and settings, mean and extremes over seeds."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        key = (
            "B" if "images_per_second" in row else "A",
            row["data"],
            row["minutes"],
            row["split"],
            row["objective"],
            row.get("encoder", "vit"),
            " ".join(row["settings"]),
        )
        groups.setdefault(key, []).append(row)
    lines = [
        " | ".join(
            [
                "| benchmark | data | minutes | split | objective | encoder | settings",
                *METRICS.values(),
                "images seen, thousands | img/s of a core, or a GPU | peak memory, MiB",
                "RankMe | law residual | seeds |",
            ]
        ),
        "|---" * (len(METRICS) + 13) + "|",
    ]
    for key, group in sorted(
        groups.items(), key=lambda item: (item[0][:4], -mean(row.get("linear", 0) for row in item[1]))
    ):
        figures = [spread([100 * row[metric] for row in group if metric in row]) for metric in METRICS]
        rate = mean(row.get("images_per_core_second") or row["images_per_second"] for row in group)
        seen, memory, rank = (
            mean(row[of] for row in group) for of in ("images_seen", "peak_memory_mib", "health/rankme")
        )
        residuals = [row["law_residual"] for row in group if row.get("law_residual") is not None]
        residual = f"{mean(residuals):.1f}" if residuals else ""
        about = [f"{seen / 1000:.0f}", f"{rate:.0f}", f"{memory:.0f}", f"{rank:.0f}", residual, str(len(group))]
        cells = [*map(str, key), *figures, *about]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    """Mean, and the extremes where there are several; nothing where there is none."""
    if not values:
        return ""
    return f"{mean(values):.1f}" + (f" ({min(values):.1f} to {max(values):.1f})" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
