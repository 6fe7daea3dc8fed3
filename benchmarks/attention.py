"""Gated attention by each backend, beside a ViT's fused attention of the same width, in one run.

python benchmarks/attention.py                                  # after the models, in make bench-backbones
python benchmarks/attention.py --tokens 4096 --device cuda

Queries and keys of 128 channels, values and a gate of 768, as a unit of ``gau_small`` has them that mixes all of its
values; the ViT's six heads have 64. Times of a forward pass without gradients, and of a forward and a backward pass;
medians, all taking turns.
bfloat16 on a GPU, float32 on a CPU. Results go to benchmarks/results/attention/<hardware>.json.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from heatssl.evaluation.results import commit, hardware, write_record
from heatssl.ops import attention

RESULTS = Path(__file__).parent / "results" / "attention"
KEYS, VALUES, HEADS = 128, 768, 6
Way = tuple[Callable[[], Tensor], list[Tensor]]


def main() -> None:
    """Measure and print one line for each way and number of tokens."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", help="CPU: 49 196 1024, GPU: to 16384")
    parser.add_argument("--batch-tokens", type=int, help="tokens in a batch; CPU: 1024, GPU: 65536")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()
    device = torch.device(settings.device)
    is_gpu = device.type == "cuda"
    rows = []
    for tokens in settings.tokens or ([49, 196, 1024, 4096, 16384] if is_gpu else [49, 196, 1024]):
        batch = max(1, (settings.batch_tokens or (65536 if is_gpu else 1024)) // tokens)
        rows += measure(ways(batch, tokens, device), tokens, batch, settings.repeats, device)
    record = {
        "hardware": hardware(device),
        "seed": 0,
        "repeats": settings.repeats,
        "torch": torch.__version__,
        "commit": commit(),
        "rows": rows,
    }
    path = write_record(RESULTS, record)
    print(f"-> {path}")


def ways(batch: int, tokens: int, device: torch.device) -> dict[str, Way]:
    """What is compared, each with the tensors that want a gradient."""
    torch.manual_seed(0)
    kind: dict[str, Any] = {"device": device, "dtype": torch.bfloat16 if device.type == "cuda" else torch.float32}
    unit = [torch.randn(batch, tokens, width, **kind).requires_grad_() for width in (KEYS, KEYS, VALUES, VALUES)]
    query, key, value, gate = unit
    heads = [torch.randn(batch, HEADS, tokens, VALUES // 2 // HEADS, **kind).requires_grad_() for _ in range(3)]
    of_heads = (heads[0], heads[1], heads[2])

    def gated(activation: str, backend: str) -> Way:
        return lambda: attention(KEYS**-0.5 * query, key, value, gate, activation, backend=backend), unit

    def six_heads() -> Tensor:
        """What fused attention can express: queries and keys shared, scores computed for each head anew."""
        queries, keys = (each[:, None].expand(-1, HEADS, -1, -1) for each in (query, key))
        mixed = F.scaled_dot_product_attention(queries, keys, value.unflatten(2, (HEADS, -1)).transpose(1, 2))
        return gate * mixed.transpose(1, 2).flatten(2)

    backends = ("eager", "triton") if device.type == "cuda" else ("eager",)
    found = {f"{backend}, {name}": gated(name, backend) for backend in backends for name in ("softmax", "relu2")}
    found["six heads through torch, softmax"] = six_heads, unit
    return found | {"vit": (lambda: F.scaled_dot_product_attention(*of_heads), heads)}


def measure(
    compared: dict[str, Way], tokens: int, batch: int, repeats: int, device: torch.device
) -> list[dict[str, Any]]:
    """One row for each way; the first turn warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    for _ in range(repeats + 1):
        for name, (compute, leaves) in compared.items():
            times[name].append((seconds(torch.no_grad()(compute), device), seconds(backward(compute, leaves), device)))
    rows = []
    for name, pairs in times.items():
        forward, both = (round(1e3 * median(column), 3) for column in zip(*pairs[1:], strict=True))
        rows.append({"tokens": tokens, "batch": batch, "way": name, "forward_ms": forward, "with_backward_ms": both})
        print(f"{tokens:6} tokens, {name:32} forward {forward:9.3f} ms, with backward {both:9.3f} ms", flush=True)
    return rows


def backward(compute: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], None]:
    def run() -> None:
        for leaf in leaves:
            leaf.grad = None
        compute().sum().backward()

    return run


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """By the clock, when the device has finished."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
