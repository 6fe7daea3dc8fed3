"""The C++ of the residual loss: compiled once per machine and kept, whatever the machine and whoever else starts."""

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from heatssl.ops import compiled, residual_loss
from heatssl.ops import residual_loss as dispatch_function

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="needs a C++ compiler"
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A library that a test may put in the place of one it does not want to wait for."""
    return compiled._compile(compiled._command(), tmp_path_factory.mktemp("built") / "library.so")


@pytest.fixture
def compilations(monkeypatch, tmp_path, built):
    """Every test starts with an empty cache folder, and sees what is compiled."""
    made = []

    def compile_quickly(command, path):
        made.append(path)
        return Path(shutil.copy(built, path))

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(compiled, "_compile", compile_quickly)
    compiled.library.cache_clear()
    yield made
    compiled.library.cache_clear()


def files(folder):
    return sorted(path.name for path in folder.rglob("*") if path.is_file())


@needs_compiler
def test_what_was_compiled_is_kept(compilations, tmp_path):
    for _ in range(3):
        compiled.library.cache_clear()  # as a new process
        assert compiled.library().float32
    assert len(compilations) == 1
    assert files(tmp_path) == [compilations[0].name]


@needs_compiler
def test_another_processor_gets_its_own(compilations, tmp_path, monkeypatch):
    """A home folder on a network: instructions that one node lacks would end a run on it without a word."""
    compiled.library()
    monkeypatch.setattr(compiled, "_instructions", lambda: "flags : sse2")
    compiled.library.cache_clear()
    compiled.library()
    assert len(files(tmp_path)) == 2


def test_instructions_are_what_this_processor_has():
    if Path("/proc/cpuinfo").exists():
        assert compiled._instructions()
        assert "-march=native" in compiled._command()


def test_an_unknown_processor_gets_nothing_special(monkeypatch):
    monkeypatch.setattr(compiled, "_instructions", lambda: "")
    assert "-march=native" not in compiled._command()


@needs_compiler
def test_a_home_that_cannot_be_written_costs_time_only(compilations, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.library().float32
    assert len(compilations) == 1
    assert not compilations[0].exists(), "nothing is left behind"


@needs_compiler
@pytest.mark.parametrize("trouble", ["damaged", "searched", "full"])
def test_a_cache_in_any_trouble_costs_time_only(trouble, compilations, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    compiled.library()
    (kept,) = tmp_path.rglob("*.so")
    compiled.library.cache_clear()
    if trouble == "damaged":
        kept.unlink()  # another file: the one that is loaded must stay what it is
        kept.write_bytes(b"")
    elif trouble == "searched":  # a folder that may not be looked into, as root may
        monkeypatch.setattr(Path, "exists", forbidden)
    else:
        kept.unlink()
        once = iter([True])
        compile_ = compiled._compile
        monkeypatch.setattr(compiled, "_compile", lambda *words: no_space() if next(once, False) else compile_(*words))
    assert compiled.library().float32


def forbidden(_path):
    raise PermissionError(13, "Permission denied")


def no_space():
    raise RuntimeError("final link failed: No space left on device")


@needs_compiler
def test_a_compiler_that_fails_is_quoted_once(tmp_path, monkeypatch):
    module = sys.modules[dispatch_function.__module__]
    compiler = tmp_path / "compiler"
    compiler.write_text("#!/bin/sh\necho 'In file included' >&2\necho 'fatal error: no such header' >&2\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", f"{compiler} -pipe")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    compiled.library.cache_clear()
    module._load_compiled.cache_clear()
    z = torch.randn(1, 2, 4, 4)
    try:
        with pytest.warns(UserWarning, match="fatal error: no such header"):
            value = residual_loss(z, torch.ones(3, 3), backend="compiled")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert torch.equal(residual_loss(z, torch.ones(3, 3), backend="compiled"), value)
    finally:
        compiled.library.cache_clear()
        module._load_compiled.cache_clear()
    assert files(tmp_path / "cache") == []


FIRST_CALL = """
import torch, warnings
warnings.simplefilter("error")
from heatssl.ops import residual_loss
z = torch.arange(2 * 3 * 6 * 5, dtype=torch.float32).square().view(2, 3, 6, 5)
print(residual_loss(z, torch.tensor([[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]), backend="compiled").item())
"""


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_do_not_get_in_each_other_s_way(tmp_path):
    """As those of one distributed run do; the folder that a killed one left behind holds nobody up."""
    (tmp_path / "heatssl" / "tmpkilled").mkdir(parents=True)
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    started = [
        subprocess.Popen([sys.executable, "-c", FIRST_CALL], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    printed = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0, 0]
    assert len(set(printed)) == 1
    assert len(files(tmp_path)) == 1
