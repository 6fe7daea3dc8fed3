"""Triton without a GPU."""

import os
import subprocess
import sys
from collections.abc import Callable

import pytest


@pytest.fixture
def in_the_interpreter() -> Callable[[str], None]:
    """Run a program, which prints "checked" at its end, in a process whose Triton interprets its kernels."""
    pytest.importorskip("triton")

    def run(program: str) -> None:
        environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=300, check=False
        )
        assert "checked" in done.stdout, done.stderr[-2000:]

    return run
