"""What a command frees is there for its next batch: without new page faults, on glibc."""

import subprocess
import sys

import pytest

from heatssl.allocator import keep_freed_memory

FAULTS = """
import resource, torch
{first}
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.zeros(1 << 25).add_(1)  # 128 MiB
before = faults()
torch.zeros((1 << 25) - (1 << 12)).add_(1)  # aligned within what was freed
print(faults() - before)
"""


def faults_of_a_second_tensor(first: str) -> int:
    """Pages of 4 KiB that a process had to ask for anew; huge pages are 512 times as large."""
    script = FAULTS.format(first=first)
    return int(subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout)


def test_a_second_tensor_takes_the_memory_of_the_first() -> None:
    if not keep_freed_memory():
        pytest.skip("malloc is not glibc's")
    as_it_is = faults_of_a_second_tensor("")
    kept = faults_of_a_second_tensor("from heatssl.allocator import keep_freed_memory; keep_freed_memory()")
    assert kept < as_it_is / 4


def test_a_command_keeps_what_it_frees(tmp_path) -> None:
    if not keep_freed_memory():
        pytest.skip("malloc is not glibc's")
    command = f"from heatssl.cli import main; assert main(['health', 'run={tmp_path}/none']) == 2"
    assert faults_of_a_second_tensor(command) < faults_of_a_second_tensor("") / 4


def test_a_library_leaves_the_process_as_it_was() -> None:
    """``import heatssl`` and all of its rooms must not change the allocator of somebody else's program."""
    if not keep_freed_memory():
        pytest.skip("malloc is not glibc's")
    imports = "import heatssl, heatssl.training, heatssl.evaluation, heatssl.attribution, heatssl.cli"
    assert faults_of_a_second_tensor(imports) > faults_of_a_second_tensor("") / 2
