"""The fused residual loss and the moves to all quarters, beside what they replace, in one run.

python benchmarks/ops.py                    # make bench-ops
python benchmarks/ops.py --repeats 9 --shapes 64x384x14x14

Forward and backward of the mean squared Laplacian. Repetitions are interleaved, so that what else the machine does
falls on all alike; medians, and the best of each beside them, which a busy machine disturbs least. Times are in
copies: one copy is ``z.clone()`` in the same run. Results go to benchmarks/results/ops/<hardware>.json.
"""

import argparse
import ctypes
import platform
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import kornia
import torch
from torch import Tensor

from heatssl.evaluation.results import commit, hardware, write_record
from heatssl.heat import FirstOrder, Propagator, laplacian_stencil
from heatssl.ops import Backend, Boundary, depthwise_stencil, residual_loss

RESULTS = Path(__file__).parent / "results" / "ops"
FIVE = laplacian_stencil("5pt")
EIGHT = torch.tensor([[1.0, 1, 1], [1, -8, 1], [1, 1, 1]])  # kornia's laplacian with kernel_size=3
# On a GPU some gigabytes: what fits into its cache, or takes less time than a launch, says nothing of its memory.
SHAPES = {"cpu": ["64x384x14x14", "16x384x32x32"], "cuda": ["6144x384x14x14", "1536x384x32x32"]}
# Reads and writes of the whole field that an implementation cannot do without: loss and gradient in one sweep, or
# one read forward and a read and a write backward.
LEAST_TRAFFIC = {"compiled": 2, "triton": 3}

SLEEP = 4_000_000  # cycles, two milliseconds

Loss = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", help=f"CPU: {' '.join(SHAPES['cpu'])}, GPU: {' '.join(SHAPES['cuda'])}")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    settings = parser.parse_args()
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    device = torch.device(settings.device)
    load = Path("/proc/loadavg")
    record: dict[str, object] = {
        "hardware": hardware(device),
        "threads": settings.threads,
        "load_before": float(load.read_text().split()[0]) if load.exists() else None,
        "seed": 0,
        "repeats": settings.repeats,
        "commit": commit(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "kornia": kornia.__version__},
    }
    rows: list[dict[str, object]] = []
    for shape in settings.shapes or SHAPES[device.type]:
        size = tuple(int(n) for n in shape.split("x"))
        for layout in (torch.contiguous_format, torch.channels_last):
            for boundary in ("interior", "replicate") if layout == torch.contiguous_format else ("interior",):
                rows += residual_rows(size, layout, boundary, settings.repeats, device)
    record["residual_loss"] = rows
    record["quarters"] = [
        row
        for size in [(64, 384, 7, 7), (64, 128, 4, 4)]
        for commuting in (True, False)
        for row in quarter_rows(size, commuting, settings.repeats, device)
    ]
    path = write_record(RESULTS, record)
    print(f"-> {path}")


def residual_rows(
    size: tuple[int, ...], layout: torch.memory_format, boundary: Boundary, repeats: int, device: torch.device
) -> list[dict[str, object]]:
    """Everything that computes one and the same loss on one field."""
    z = torch.randn(size, device=device).to(memory_format=layout).requires_grad_()
    fast: Backend = "triton" if device.type == "cuda" else "compiled"
    losses: dict[str, Loss] = {
        fast: lambda z: residual_loss(z, FIVE, boundary, fast),
        "eager": lambda z: residual_loss(z, FIVE, boundary, "eager"),
        "slices": lambda z: by_slices(z, boundary).square().mean(),
    }
    if boundary == "replicate":
        losses["kornia.spatial_gradient"] = by_spatial_gradient
        losses["kornia.laplacian"] = lambda z: kornia.filters.laplacian(z, 3, "replicate", False).square().mean()
        losses[f"{fast}, 8 neighbours"] = lambda z: residual_loss(z, EIGHT, boundary, fast)
    references = {name: EIGHT if name.endswith(("laplacian", "neighbours")) else FIVE for name in losses}
    for name, loss in losses.items():  # also the warm-up; only the same numbers may be compared
        check(name, loss, z, references[name], boundary)
    empty = torch.empty_like(z)
    timed: dict[str, Callable[[], object]] = {
        "copy": z.detach().clone,
        "copy into place": lambda: empty.copy_(z.detach()),
        **{name: partial(backward, loss, z) for name, loss in losses.items()},
    }
    seconds = interleaved(timed, repeats, device)
    copy, best_copy = seconds["copy"]
    rows = []
    where = (
        f"{'x'.join(map(str, size))} {'channels_last' if layout == torch.channels_last else 'contiguous'} {boundary}"
    )
    print(f"\n{where}; one copy {1e3 * copy:.2f} ms, best {1e3 * best_copy:.2f} ms")
    for name, (value, best) in seconds.items():
        traffic = LEAST_TRAFFIC.get(name.partition(",")[0])
        row = {
            "field": where,
            "name": name,
            "milliseconds": round(1e3 * value, 3),
            "best_milliseconds": round(1e3 * best, 3),
            "copies": round(value / copy, 2),
            "copies_of_best": round(best / best_copy, 2),
            "over_slices": round(seconds["slices"][0] / value, 2),
            "over_slices_of_best": round(seconds["slices"][1] / best, 2),
            "share_of_copy_bandwidth": round(traffic / 2 * copy / value, 2) if traffic else None,
            "peak_memory": peak_memory(losses[name], z) if name in losses else None,
        }
        rows.append(row)
        print(
            f"{name:24} {row['milliseconds']:8.2f} ms, {row['copies']:6.2f} copies, slices x{row['over_slices']:6.2f};"
            f" best {row['best_milliseconds']:8.2f} ms, {row['copies_of_best']:6.2f} copies,"
            f" slices x{row['over_slices_of_best']:6.2f}; bandwidth {row['share_of_copy_bandwidth'] or '-'},"
            f" peak memory {row['peak_memory'] or '-'}",
            flush=True,
        )
    return rows


def by_slices(z: Tensor, boundary: Boundary) -> Tensor:
    """The 5-point Laplacian as everybody writes it first."""
    if boundary != "interior":
        z = torch.nn.functional.pad(z, (1, 1, 1, 1), mode=boundary)
    beside = z[:, :, 1:-1, :-2] + z[:, :, 1:-1, 2:]
    return z[:, :, :-2, 1:-1] + z[:, :, 2:, 1:-1] + beside - 4 * z[:, :, 1:-1, 1:-1]


def by_spatial_gradient(z: Tensor) -> Tensor:
    """z_xx + z_yy out of kornia's three second derivatives; its border is ``replicate``."""
    second = kornia.filters.spatial_gradient(z, mode="diff", order=2)
    return (second[:, :, 0] + second[:, :, 2]).square().mean()


def check(name: str, loss: Loss, z: Tensor, stencil: Tensor, boundary: Boundary) -> None:
    """Refuse to time what computes something else."""
    part = z.detach()[:2, :8].clone().requires_grad_()
    expected = depthwise_stencil(part, stencil, boundary).square().mean()
    value = loss(part)
    ours, theirs = torch.autograd.grad(value, part)[0], torch.autograd.grad(expected, part)[0]
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=0, msg=lambda text: f"{name}: {text}")
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6, msg=lambda text: f"{name}: {text}")


def backward(loss: Loss, z: Tensor) -> None:
    z.grad = None
    loss(z).backward()


def interleaved(
    calls: dict[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, tuple[float, float]]:
    """Median and least seconds of each, all taking turns; the first turn is not counted."""
    seconds = seconds_on_gpu if device.type == "cuda" else seconds_on_cpu
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            value = seconds(call)
            if turn:
                times[name].append(value)
    return {name: (median(values), min(values)) for name, values in times.items()}


def seconds_on_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def seconds_on_gpu(call: Callable[[], object]) -> float:
    """Of the device: it sleeps first, so that all launches are there before any of them begins."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP)
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1000


def peak_memory(loss: Loss, z: Tensor) -> float | None:
    """Most memory in use during forward and backward, over that of z and its gradient; on a CPU, Linux only."""
    z.grad = None
    if z.is_cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        backward(loss, z)
        more = torch.cuda.max_memory_allocated() - before
        return round((z.nbytes + more) / (2 * z.nbytes), 2)
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what was freed before must not hide what is allocated now
        Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
        before = memory("VmRSS")
        backward(loss, z)
        return round((z.nbytes + memory("VmHWM") - before) / (2 * z.nbytes), 2)
    except OSError:
        return None


def memory(field: str) -> int:
    """Bytes, from /proc."""
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return 1024 * int(found.group(1)) if found else 0


def quarter_rows(size: tuple[int, ...], commuting: bool, repeats: int, device: torch.device) -> list[dict[str, object]]:
    """The visible quarter moved onto the others: one move per block and corner, and all at once."""
    law = FirstOrder(size[1], commuting=commuting).to(device)
    quarter = torch.randn(size, device=device, requires_grad=True)
    corner = torch.arange(size[0], device=device) * 4 // size[0]

    def one_by_one() -> Tensor:
        return Propagator.move_to_quarters(law, quarter, corner)

    def at_once() -> Tensor:
        return law.move_to_quarters(quarter, corner)

    torch.testing.assert_close(one_by_one(), at_once(), rtol=1e-3, atol=1e-3)
    calls: dict[str, Callable[[], object]] = {
        "one by one": lambda: one_by_one().square().sum().backward(),
        "at once": lambda: at_once().square().sum().backward(),
    }
    seconds = interleaved(calls, repeats, device)
    where = f"{'x'.join(map(str, size))} {'commuting' if commuting else 'full'}"
    print(
        f"\nquarters {where}: "
        + ", ".join(f"{name} {1e3 * value:.1f} ms (best {1e3 * best:.1f})" for name, (value, best) in seconds.items())
    )
    return [
        {
            "quarter": where,
            "name": name,
            "milliseconds": round(1e3 * value, 2),
            "best_milliseconds": round(1e3 * best, 2),
        }
        for name, (value, best) in seconds.items()
    ]


if __name__ == "__main__":
    main()
