"""What every test starts from."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from heatssl.cache_folder import cache_folder

ROOT = Path(__file__).resolve().parent.parent

# Tests are small: more threads than one only get in each other's way, and in that of data workers.
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Tests leave the user's cache folder alone, but need not compile what is compiled there."""
    there = cache_folder()
    here = tmp_path_factory.mktemp("cache") / "heatssl"
    here.mkdir()
    for compiled in there.glob("*.so"):
        (here / compiled.name).symlink_to(compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(here.parent))
        yield


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository."""
    return ROOT


@pytest.fixture(scope="session")
def python() -> str:
    """The interpreter that runs the tests, for tests that start a process."""
    return sys.executable
