"""Training steps of every objective over the same backbone, in images a second and in operations, in one run.

python benchmarks/throughput.py                                                     # make bench-throughput
python benchmarks/throughput.py --backbones vit_base_patch16_224 --batch 256 --device cuda

A step is a forward and a backward pass on random images that lie on the device already; no optimizer, no data. On a
CPU one thread works and its own time is counted, so that a busy machine changes little; repetitions are interleaved.
Operations are those of the matrix products and convolutions of one forward pass, two a multiply-add. Ratios are to
MAE as its paper has it. Results go to benchmarks/results/throughput/<hardware>.json.
"""

import argparse
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from heatssl import objectives
from heatssl.backbones import create_backbone
from heatssl.evaluation.results import commit, hardware, write_record

RESULTS = Path(__file__).parent / "results" / "throughput"
REFERENCE = "mae"
# Everything but the name is as in configs/objective, unless it says otherwise.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae"},
    "mae, 1 block": {"name": "mae", "decoder_depth": 1},
    "mae, 1 block of 128": {"name": "mae", "decoder_depth": 1, "decoder_width": 128, "decoder_heads": 4},
    "heat_completion": {"name": "heat_completion"},
    "heat_completion, mean paints nothing": {"name": "heat_completion", "rest_weight": 0.0},
    "heat_completion, linear painter": {"name": "heat_completion", "painter_width": 0},
    "qb_heat": {"name": "qb_heat"},
    "finola": {"name": "finola"},
    "heat_jepa": {"name": "heat_jepa"},
    "heat_jepa, visible_ratio=0.375": {"name": "heat_jepa", "visible_ratio": 0.375},
    "simmim": {"name": "simmim"},
    "simclr": {"name": "simclr"},
    "lejepa": {"name": "lejepa"},
}


def main() -> None:
    """Measure what was asked for and print one table for each backbone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--backbones", nargs="+", default=["vit_small_patch16_224", "vit_base_patch16_224"])
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--objectives", nargs="+", default=list(OBJECTIVES), help="%(default)s")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(settings.device)
    rows = []
    for backbone in settings.backbones:
        rows += measure(backbone, device, settings)
        print(table([row for row in rows if row["backbone"] == backbone]), flush=True)
    record = {
        "hardware": hardware(device),
        "threads": 1,
        "precision": "bf16 autocast" if device.type == "cuda" else "float32",
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
    }
    path = write_record(RESULTS, record)
    print(f"-> {path}")


def measure(backbone: str, device: torch.device, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each objective; models are moved to the device for their turn alone."""
    times: dict[str, list[float]] = {name: [] for name in settings.objectives}
    rows: dict[str, dict[str, Any]] = {}
    size, batch = settings.image_size, settings.batch
    images = torch.randn(batch, 3, size, size, device=device)
    models = {}
    for name in settings.objectives:
        torch.manual_seed(0)
        models[name] = objectives.create(OBJECTIVES[name], create_backbone(backbone, size), size)
    for repeat in range(settings.repeats + 1):
        for name in settings.objectives:
            model = models[name].to(device)
            if repeat == 0:  # the first turn counts and warms up
                with FlopCounterMode(display=False) as counter, autocast(device):
                    model(images)
                rows[name] = {"backbone": backbone, "objective": name, "image_size": size, "batch": batch}
                rows[name]["forward_gflop_per_image"] = round(counter.get_total_flops() / batch / 1e9, 3)
            step(model, images)  # warms up what was dropped since its last turn
            times[name].append(step(model, images))
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
                step(model, images)
                rows[name]["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
            model.zero_grad(set_to_none=True)
            model.to("cpu")
    for name, row in rows.items():
        measured = times[name][1:]
        row["images_per_second"] = round(batch / median(measured), 2)
        row["slowest_and_fastest"] = [round(batch / max(measured), 2), round(batch / min(measured), 2)]
    return list(rows.values())


def step(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    wait, clock = (torch.cuda.synchronize, time.perf_counter) if images.is_cuda else (lambda: None, time.process_time)
    model.zero_grad(set_to_none=True)
    wait()
    start = clock()
    with autocast(images.device):
        loss = model(images).loss
    loss.backward()
    wait()
    return clock() - start


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, fastest first."""
    lines = [
        "| backbone | objective | img/s | times MAE | GFLOP forward | MAE's over these |",
        "|---|---|---|---|---|---|",
    ]
    reference = next((row for row in rows if row["objective"] == REFERENCE), None)
    for row in sorted(rows, key=lambda row: -row["images_per_second"]):
        ratios = ["", ""]
        if reference:
            ratios = [
                f"{row['images_per_second'] / reference['images_per_second']:.2f}",
                f"{reference['forward_gflop_per_image'] / row['forward_gflop_per_image']:.2f}",
            ]
        cells = [row["backbone"], row["objective"], f"{row['images_per_second']:.1f}", ratios[0]]
        lines.append("| " + " | ".join([*cells, f"{row['forward_gflop_per_image']:.2f}", ratios[1]]) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
