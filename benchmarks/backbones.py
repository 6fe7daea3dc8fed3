"""Training and inference of GAU, FLASH, RoFormerV2 and timm's ViT, of equal parameters, at 49 to 16,384 tokens.

python benchmarks/backbones.py                                                     # make bench-backbones
python benchmarks/backbones.py --tokens 196 4096 16384 --batch-tokens 65536 --device cuda --compile
python benchmarks/backbones.py --tokens 196 --memory             # what is kept in float32 and in bf16, without times

Images of patches of 16 pixels, random and on the device already; a training step is a forward and a backward pass of
the mean token, without an optimizer. On a CPU one thread works and its own time is counted, so that a busy machine
changes little; repetitions of all models are interleaved. Memory: what the forward pass keeps for the backward pass,
each storage once, parameters left out; on a GPU the peak too. Operations are those of the matrix products and
convolutions of one forward pass, two a multiply-add. Results go to benchmarks/results/backbones/<hardware>.json.
"""

import argparse
import copy
import itertools
import math
import time
from pathlib import Path
from statistics import median
from typing import Any

import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import heatssl  # noqa: F401 (its models join timm's)
from heatssl.evaluation.results import commit, hardware, write_record
from heatssl.ops import recomputation

RESULTS = Path(__file__).parent / "results" / "backbones"
REFERENCE = "vit"
PATCH = 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    REFERENCE: ("vit_{size}_patch16_224", {"class_token": False, "global_pool": "avg"}),
    "gau": ("gau_{size}_patch16_224", {}),
    "gau, relu2": ("gau_{size}_patch16_224", {"normaliser": "relu2"}),
    "gau, all mixed": ("gau_{size}_patch16_224", {"mixed_share": 1.0}),
    "flash": ("flash_{size}_patch16_224", {}),
    "roformer_v2": ("roformer_v2_{size}_patch16_224", {}),
}


def main() -> None:
    """Measure what was asked for and print one table for each number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=("small", "base"), default="small")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--tokens", type=int, nargs="+", help="square numbers; CPU: 49 196 1024, GPU: to 16384")
    parser.add_argument("--batch-tokens", type=int, help="tokens in a batch; CPU: 1024, GPU: 65536")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", action="store_true", help="what is kept, in both precisions, on any machine")
    settings = parser.parse_args()
    torch.set_num_threads(1)
    if settings.memory:
        print(f"-> {compare_memory(settings)}")
        return
    device = torch.device(settings.device)
    is_gpu = device.type == "cuda"
    settings.batch_tokens = settings.batch_tokens or (65536 if is_gpu else 1024)
    rows = []
    for tokens in settings.tokens or ([49, 196, 1024, 4096, 16384] if is_gpu else [49, 196, 1024]):
        rows += measure(tokens, device, settings)
        print(f"{tokens} tokens\n\n{table([row for row in rows if row['tokens'] == tokens])}\n", flush=True)
    record = {
        "hardware": hardware(device),
        "threads": 1,
        "precision": "bf16 autocast" if is_gpu else "float32",
        "compiled": settings.compile,
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
    }
    path = write_record(RESULTS, record)
    print(f"-> {path}")


def measure(tokens: int, device: torch.device, settings: argparse.Namespace) -> list[dict[str, Any]]:
    """One row for each model, which is on the device for its turns alone."""
    side, batch = math.isqrt(tokens) * PATCH, max(1, settings.batch_tokens // tokens)
    images = torch.randn(batch, 3, side, side, device=device)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in settings.models}
    rows: dict[str, dict[str, Any]] = {}
    models: dict[str, Any] = {name: create(name, settings.size, side) for name in settings.models}
    for repeat in range(settings.repeats + 1):
        for name in settings.models:
            model = models[name].to(device)
            if repeat == 0:  # the first turn counts and warms up
                rows[name] = {"model": name, "tokens": tokens, "batch": batch, **count(model, images)}
                models[name] = torch.compile(model) if settings.compile else model
            if repeat or images.is_cuda or settings.compile:  # an eager CPU is warm after it has counted
                times[name].append((training(models[name], images), inference(models[name], images)))
            models[name].to("cpu")
    for name, row in rows.items():
        for column, pass_ in enumerate(("training", "inference")):
            measured = [both[column] for both in times[name][-settings.repeats :]]
            rates = [float(f"{batch / seconds:.4g}") for seconds in (median(measured), max(measured), min(measured))]
            row[f"{pass_}_images_per_second"] = rates[0]
            row[f"{pass_}_slowest_and_fastest"] = rates[1:]
    return list(rows.values())


def create(name: str, size: str, side: int) -> torch.nn.Module:
    """A model for square images of ``side`` pixels, on the CPU."""
    torch.manual_seed(0)
    model, arguments = MODELS[name]
    return timm.create_model(model.format(size=size), num_classes=0, img_size=side, **arguments)


def count(model: torch.nn.Module, images: torch.Tensor) -> dict[str, Any]:
    """Parameters, operations and memory."""
    # A CPU's fused attention is unknown to the counter, and the plain form's weights of 16,384 tokens fill its memory.
    plain, shapes = sdpa_kernel(SDPBackend.MATH), copy.deepcopy(model).to("meta")
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        shapes(images[:1].to("meta"))
    kept, loss = kept_for_backward(model, images, autocast(images.device))
    loss.backward()
    figures = {
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "forward_gflop_per_image": round(counter.get_total_flops() / 1e9, 3),
        "kept_for_backward_mib_per_image": round(kept / len(images), 2),
    }
    if images.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        training(model, images)
        figures["peak_memory_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)
    return figures


def kept_for_backward(
    model: torch.nn.Module, images: torch.Tensor, precision: torch.autocast
) -> tuple[float, torch.Tensor]:
    """MiB that a forward pass keeps, each storage once, parameters left out; and the loss that holds them."""
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), precision:
        loss = model(images).square().mean()
    return sum(kept.values()) / 2**20, loss


def compare_memory(settings: argparse.Namespace) -> Path:
    """Half of what three images keep more than one, so that copies of parameters, made once, are left out.

    Three images are told to keep what each image of a large batch does.
    """
    recomputation._WORTH["cpu"] = 0
    rows = []
    for tokens, name in itertools.product(settings.tokens or [196], settings.models):
        side = math.isqrt(tokens) * PATCH
        model, images = create(name, settings.size, side), torch.randn(3, 3, side, side)
        row: dict[str, Any] = {"model": name, "tokens": tokens}
        for precision in (torch.float32, torch.bfloat16):
            cast = torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16)
            three, one = (kept_for_backward(model, images[:number], cast)[0] for number in (3, 1))
            row[f"{str(precision).removeprefix('torch.')}_mib_per_image"] = round((three - one) / 2, 2)
        rows.append(row)
        print(row, flush=True)
    return write_record(
        RESULTS / "memory", {"hardware": hardware(torch.device("cpu")), "commit": commit(), "rows": rows}
    )


def training(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward and backward pass."""
    model.train().zero_grad(set_to_none=True)
    start = now(images)
    with autocast(images.device):
        loss = model(images).square().mean()
    loss.backward()
    return now(images) - start


@torch.no_grad()
def inference(model: torch.nn.Module, images: torch.Tensor) -> float:
    """Seconds of one forward pass in evaluation mode."""
    model.eval()
    start = now(images)
    with autocast(images.device):
        model(images)
    return now(images) - start


def now(images: torch.Tensor) -> float:
    """Seconds: on a GPU when it has finished, on a CPU of this process."""
    if images.is_cuda:
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def autocast(device: torch.device) -> torch.autocast:
    """bf16 on a GPU, float32 elsewhere."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, with ratios to the ViT."""
    columns = {
        "training, img/s": "training_images_per_second",
        "inference, img/s": "inference_images_per_second",
        "kept for backward, MiB/img": "kept_for_backward_mib_per_image",
        "GFLOP forward": "forward_gflop_per_image",
    }
    reference = next((row for row in rows if row["model"] == REFERENCE), None)
    lines = ["| model | " + " | ".join(f"{title} (to ViT)" for title in columns) + " |", "|---" * 5 + "|"]
    for row in rows:
        cells = [
            f"{row[key]:.3g}" + (f" ({row[key] / reference[key]:.2f})" if reference else "") for key in columns.values()
        ]
        lines.append(f"| {row['model']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
