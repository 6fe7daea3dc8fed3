"""Promises of the repository about itself: sizes, names, the Makefile, one version."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from heatssl import __version__

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(
    path for folder in ("heatssl", "tools", "tests", "benchmarks") for path in (ROOT / folder).rglob("*.py")
)
TARGETS = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_no_file_is_longer_than_one_can_read() -> None:
    files = [*SOURCES, *(ROOT / "heatssl").rglob("*.cpp")]
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files}
    assert {name: length for name, length in lengths.items() if length > 400} == {}


def test_no_file_has_a_name_that_says_nothing() -> None:
    nameless = {"utils", "util", "helpers", "helper", "misc", "common"}
    assert [path for path in SOURCES if path.stem in nameless] == []


def test_make_alone_lists_every_target() -> None:
    shown = subprocess.run(
        ["make", "-C", str(ROOT), "--no-print-directory"], capture_output=True, text=True, check=True
    )
    listed = re.findall(r"^make (\S+)", shown.stdout, flags=re.MULTILINE)
    assert listed == TARGETS
    assert {"setup", "demo", "test", "test-all", "lint", "type", "bench", "docs", "clean"} <= set(listed)


def test_ci_runs_what_a_user_is_told_to_run() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert "make test" in lines
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111, "it must be executable"


def test_make_refuses_a_python_that_cannot_run_heatssl(tmp_path: Path) -> None:
    """Without the check the first error would be pip's, a screen long."""
    (tmp_path / "Makefile").write_text((ROOT / "Makefile").read_text())
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("python3.13", "python3.12", "python3.11", "python3", "python"):
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    done = subprocess.run(
        ["make", "-C", str(tmp_path), ".venv/bin/python"],
        env={"PATH": f"{tools}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert "heatssl needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_one_version_everywhere() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == __version__
    assert citation["cff-version"] == "1.2.0"
    assert {"message", "title", "authors", "license"} <= set(citation)


def test_torch_has_a_floor_and_no_cap_and_bad_lightnings_are_out() -> None:
    """A cap on torch breaks installs beside a newer one; two uploads of lightning were compromised."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needs = {need.name: need.specifier for need in map(Requirement, project["dependencies"])}
    assert [clause.operator for clause in needs["torch"]] == [">="]
    assert "2.6.2" not in needs["lightning"]
    assert "2.6.3" not in needs["lightning"]
    assert "2.6.6" in needs["lightning"]


def test_what_a_run_needs_is_declared() -> None:
    """An import that only a developer's environment satisfies fails on the user's machine."""
    from packaging.requirements import Requirement

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {Requirement(need).name.lower() for need in project["dependencies"]}
    for extra in ("log", "onnx"):  # each asked for where it is missing, by the name of the extra
        declared |= {Requirement(need).name.lower() for need in project["optional-dependencies"][extra]}
    modules = {"pillow": "PIL", "hydra-core": "hydra", "pyyaml": "yaml"}
    allowed = {modules.get(name, name) for name in declared} | set(sys.stdlib_module_names) | {"heatssl", "markupsafe"}
    allowed |= {"triton"}  # comes with torch where there is a GPU, and is imported only for a field that lies on one
    imported = re.compile(r"^\s*(?:from|import) ([a-zA-Z_]\w*)", flags=re.MULTILINE)
    foreign = {
        (str(path.relative_to(ROOT)), module)
        for path in (ROOT / "heatssl").rglob("*.py")
        for module in imported.findall(re.sub(r'""".*?"""', "", path.read_text(), flags=re.DOTALL))
        if module not in allowed
    }
    assert foreign == set()


def test_readme_and_docs_fit_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "check_docs.py")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("page", "problem"),
    [
        ("[a](nowhere.md)", "leads nowhere"),
        ("```bash\nheatssl pretrain trainer.step=1\n```", "did you mean"),
        ("```\n$ heatssl knn \\\n    kay=1  # k\n```", "kay"),
        ("```python\nif:\n```", "Python block"),
    ],
)
def test_the_docs_check_finds_what_is_wrong(page: str, problem: str, tmp_path: Path) -> None:
    import runpy

    (tmp_path / "page.md").write_text(page + "\n")
    check = runpy.run_path(str(ROOT / "tools" / "check_docs.py"))["page_problems"]
    found = list(check(tmp_path / "page.md"))
    assert len(found) == 1
    assert problem in found[0]
