"""The residual loss on a CPU: ``residual_loss.cpp``, compiled for the processor at hand on the first call ever.

The loss is a scalar, so its gradient for an upstream gradient of 1 is known as soon as the field is: one sweep makes
both. The C++ needs a compiler with OpenMP and two of torch's headers, neither ninja nor Python's own headers, and
compiles in seconds. What it becomes is kept in the user's cache folder, under a name that changes with the source,
the command, torch's version and the processor's instructions. Processes that need it at the same time each compile
their own and put it there in one step: nobody waits for a lock, which a killed process could leave behind.
"""

import ctypes
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
from functools import lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from heatssl.cache_folder import cache_folder
from heatssl.ops.stencil import Boundary, Weights, accumulator, responses

SOURCE = Path(__file__).with_name("residual_loss.cpp")
_NAMES = {torch.float32: "float32", torch.float64: "float64", torch.float16: "float16", torch.bfloat16: "bfloat16"}
_BOUNDARIES = {"interior": 0, "replicate": 1, "reflect": 2}


def loss(z: Tensor, weights: Weights, boundary: Boundary) -> Tensor:
    """Mean squared response of z (B, C, H, W) that :func:`fits`: scalar in float32 (float64 for float64)."""
    return _sweep(z, None, weights, boundary, 1)


def loss_and_gradient(z: Tensor, weights: Weights, boundary: Boundary, upstream: float = 1) -> tuple[Tensor, Tensor]:
    """:func:`loss`, and ``upstream`` times its gradient, like z in shape, type and layout, from one sweep."""
    gradient = torch.empty_like(z)
    return _sweep(z, gradient, weights, boundary, upstream), gradient


def gradient(z: Tensor, weights: Weights, boundary: Boundary, upstream: Tensor) -> Tensor:
    """The second of :func:`loss_and_gradient`; ``upstream`` is a scalar."""
    return loss_and_gradient(z, weights, boundary, upstream.item())[1]


def fits(z: Tensor) -> bool:
    """Whether a sweep can walk this field: on a CPU, dense, and of a type that it knows."""
    dense = z.is_contiguous() or z.is_contiguous(memory_format=torch.channels_last)
    return z.device.type == "cpu" and dense and z.dtype in _NAMES and z.numel() > 0 and not z.is_neg()


def _sweep(z: Tensor, gradient: Tensor | None, weights: Weights, boundary: Boundary, upstream: float) -> Tensor:
    batch, channels, height, width = z.shape
    planes, step = (batch * channels, 1) if z.is_contiguous() else (batch, channels)
    count = responses(z, boundary)
    total = getattr(library(), _NAMES[z.dtype])(
        z.data_ptr(),
        None if gradient is None else gradient.data_ptr(),
        planes,
        height,
        width,
        step,
        (ctypes.c_double * 9)(*(weight for row in weights for weight in row)),
        upstream * 2 / count,
        _BOUNDARIES[boundary],
        torch.get_num_threads(),
    )
    return torch.tensor(total / count, dtype=accumulator(z.dtype), device=z.device)


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The compiled source, from the cache folder where it is there already.

    Raises:
        RuntimeError: without a compiler, or with one that does not compile it.
        OSError: where what was compiled cannot be loaded.
    """
    command = _command()
    key = "\n".join([*command, torch.__version__, platform.machine(), _instructions(), SOURCE.read_text()])
    name = f"residual_loss_{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    kept = cache_folder() / name
    try:
        if not kept.exists():
            kept.parent.mkdir(parents=True, exist_ok=True)
            with TemporaryDirectory(dir=kept.parent) as folder:  # on the same file system
                _compile(command, Path(folder) / name).replace(kept)
        return _load(kept)
    except (OSError, RuntimeError):
        # A home that is full, that may not be written, searched or run from, or a damaged file: for this process alone.
        with TemporaryDirectory() as folder:
            return _load(_compile(command, Path(folder) / name))


def compiler() -> list[str] | None:
    """The words that call the C++ compiler of this machine; None: it has none."""
    known = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    return next((words for words in map(shlex.split, known) if words and shutil.which(words[0])), None)


def _command() -> list[str]:
    words = compiler()
    if words is None:
        raise RuntimeError("no C++ compiler found")
    flags = ["-std=c++17", "-O3", "-ffp-contract=fast", "-fopenmp", "-fPIC", "-shared"]
    flags += ["-fno-tree-loop-distribute-patterns"]  # short rows: copying them inline is faster than calling memcpy
    if _instructions():
        flags += ["-march=native"]
    if platform.machine() in {"x86_64", "AMD64"}:
        flags += ["-mprefer-vector-width=256"]  # most loads are unaligned; longer ones cross a cache line each time
    return [*words, *flags, f"-I{Path(torch.__file__).parent / 'include'}"]


def _instructions() -> str:
    """What the processor can do, as Linux tells; empty where it does not, and then nothing is compiled for it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    return "\n".join(sorted({line for line in lines if line.startswith(("flags", "Features", "isa"))}))


def _compile(command: list[str], path: Path) -> Path:
    words = [*command, str(SOURCE), "-o", str(path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)  # noqa: S603 (the user's own compiler)
    if done.returncode:
        lines = done.stderr.splitlines() or [f"exit code {done.returncode}"]
        raise RuntimeError(next((line for line in lines if "error" in line), lines[0]))
    return path


def _load(path: Path) -> ctypes.CDLL:
    """OpenMP's functions resolve to those that torch has loaded already: both share one set of threads."""
    loaded = ctypes.CDLL(str(path))
    for name in _NAMES.values():
        function = getattr(loaded, name)
        function.restype = ctypes.c_double
        function.argtypes = [*[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 4, ctypes.c_void_p, ctypes.c_double]
        function.argtypes += [ctypes.c_int, ctypes.c_int]
    return loaded
