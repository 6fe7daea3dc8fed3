"""The built wheel, installed, in an empty folder: the configs must travel with it."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """heatssl built from this checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into; its dependencies come from the running environment."""
    folder = tmp_path_factory.mktemp("installed")
    words = ["pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(folder), str(wheel)]
    subprocess.run([sys.executable, "-m", *words], check=True, capture_output=True)
    return folder


def run(installed: Path, folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the installed package in ``folder``."""
    environment = os.environ | {"PYTHONPATH": str(installed)}
    return subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_the_wheel_holds_every_config_and_nothing_of_the_workshop(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    shipped = {f"heatssl/configs/{path.relative_to(ROOT / 'configs')}" for path in (ROOT / "configs").rglob("*.yaml")}
    assert shipped <= names
    assert len(shipped) >= 10
    suffixes = {".html", ".css", ".js", ".typed", ".cpp"}
    data_files = [path for path in (ROOT / "heatssl").rglob("*") if path.suffix in suffixes]
    assert {str(path.relative_to(ROOT)) for path in data_files} <= names
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"heatssl"}


def test_help_lists_the_shipped_options_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    done = run(installed, tmp_path, str(installed / "bin" / "heatssl"), "pretrain", "--help")
    assert done.returncode == 0, done.stderr
    assert "recipe=imagenette_cpu" in done.stdout
    assert "objective=qb_heat" in done.stdout


def test_recipes_compose_in_an_empty_folder(installed: Path, tmp_path: Path) -> None:
    script = (
        "import heatssl\nfrom heatssl.composition import compose\n"
        "print(heatssl.__file__)\nprint(compose('pretrain', ['recipe=demo', 'seed=3']).seed)"
    )
    done = run(installed, tmp_path, sys.executable, "-c", script)
    assert done.returncode == 0, done.stderr
    location, seed = done.stdout.split()
    assert Path(location).is_relative_to(installed), "the wheel is what must be tested"
    assert seed == "3"
    assert list(tmp_path.iterdir()) == [], "composing writes nothing"
