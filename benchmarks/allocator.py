"""What it costs on a CPU that the C library gives large blocks back to the system, and gets them anew.

python benchmarks/allocator.py

A forward pass of 32 images of 224 pixels without gradients, as every command that evaluates makes it, and a step of
training on 8, in processes of their own with and without heatssl.allocator.keep_freed_memory; one thread, CPU seconds
of the process, median of three after one that warms up, and its peak memory. Rows go to
benchmarks/results/allocator.jsonl.
"""

import argparse
import itertools
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

from heatssl.allocator import keep_freed_memory
from heatssl.backbones import create_backbone, pooled_features
from heatssl.evaluation.results import commit, hardware

RESULTS = Path(__file__).parent / "results" / "allocator.jsonl"
MODELS = ("vit_small_patch16_224", "gau_small_patch16_224", "resnet50")
SIDE, REPEATS, SEED = 224, 3, 0


def main() -> None:
    """Measure, or with --table only print what stands in the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--table", action="store_true", help="only print the recorded rows")
    parser.add_argument("--measure", nargs=3, metavar=("MODEL", "WORK", "KEPT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        model, work, kept = arguments.measure
        print(json.dumps(measure(model, work, kept == "kept")))
        return
    if not arguments.table:
        for case in itertools.product(arguments.models, ("forward", "training"), ("kept", "as it is")):
            command = [sys.executable, __file__, "--measure", *case]
            row = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            with RESULTS.open("a") as file:
                file.write(row)
    print(table())


def measure(model: str, work: str, kept: bool) -> dict[str, object]:
    """One row: seconds of one pass, and the most memory that the process had."""
    if kept and not keep_freed_memory():
        raise SystemExit("this C library is not glibc: there is nothing to compare")
    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    backbone = create_backbone(model, SIDE)
    optimizer = torch.optim.AdamW(backbone.parameters())
    images = torch.randn(32 if work == "forward" else 8, 3, SIDE, SIDE)
    seconds = []
    for _ in range(REPEATS + 1):
        started = time.process_time()
        if work == "forward":
            with torch.no_grad():
                pooled_features(backbone.eval(), images)
        else:
            pooled_features(backbone.train(), images).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    return {
        "model": model,
        "work": work,
        "kept": kept,
        "cpu_seconds": round(statistics.median(seconds[1:]), 3),
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "seed": SEED,
        "hardware": hardware(torch.device("cpu")),
        "torch": torch.__version__,
        "commit": commit(),
    }


def table() -> str:
    """Markdown, of each model and work the rows that came last."""
    rows = {(r["model"], r["work"], r["kept"]): r for r in map(json.loads, RESULTS.read_text().splitlines())}
    lines = ["| model | work | seconds, as it is | kept | ratio | peak memory, MiB | kept |", "|---" * 7 + "|"]
    for model, work, kept in rows:
        if kept:
            held, usual = rows[model, work, True], rows[model, work, False]
            ratio = usual["cpu_seconds"] / held["cpu_seconds"]
            cells = (usual["cpu_seconds"], held["cpu_seconds"], f"{ratio:.2f}", usual["peak_mib"], held["peak_mib"])
            lines.append("| " + " | ".join(map(str, (model, work, *cells))) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
