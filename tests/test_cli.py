"""The command line: help at once, one line for a mistake, and exit codes that scripts can rely on."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from heatssl import __version__, cli
from heatssl.config import SCHEMAS, setting_types
from heatssl.config_folder import groups, options
from heatssl.errors import UserError
from heatssl.help_text import EXAMPLES, SUMMARY, command_help, score_names
from heatssl.words import SAME, settings

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "lightning",
    "kornia",
    "numpy",
    "hydra",
    "omegaconf",
    "yaml",
    "matplotlib",
)


def heatssl(*words: str, folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    command = [sys.executable, "-m", "heatssl.cli", *words]
    root = str(Path(cli.__file__).resolve().parent.parent)
    paths = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | {"PYTHONPATH": paths},
    )


@pytest.mark.parametrize("words", [["--help"], ["--version"], *([command, "--help"] for command in SUMMARY)])
def test_help_imports_nothing_heavy(words: list[str]) -> None:
    """Help that imports torch takes seconds instead of a tenth of one."""
    script = (
        "import sys\nfrom heatssl.cli import main\n"
        f"try: main({words!r})\nexcept SystemExit as end: assert not end.code\n"
        f"print('imported:', [name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "imported: []"
    assert len(done.stdout.splitlines()) >= 2


def test_version_is_that_of_the_package() -> None:
    assert heatssl("--version").stdout.strip() == f"heatssl {__version__}"


def test_the_overview_lists_every_command_and_no_command_means_help(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    for command in SUMMARY:
        assert re.search(rf"^  {command} +\w", shown, flags=re.MULTILINE)


def test_help_of_attribute_lists_methods_scores_and_other_names() -> None:
    """Help reads them from the source, so that it answers at once: they must be those that the command takes."""
    from heatssl.attribution import method_names
    from heatssl.attribution.score import SCORES

    shown = command_help("attribute")
    listed = re.search(r"^methods, .*?:\n(.*?)\n\n", shown, flags=re.MULTILINE | re.DOTALL)[1]  # type: ignore[index]
    assert [line.split()[0] for line in listed.splitlines()] == method_names()
    assert "Grad-CAM (Selvaraju et al." in listed
    assert score_names() == list(SCORES)
    assert ", ".join(SCORES) in shown
    for other, name in SAME["attribute"].items():
        assert f"--{other} " in shown
        assert f" is {name}=" in shown


@pytest.mark.parametrize("command", sorted(SCHEMAS))
def test_help_of_a_command_lists_its_settings_and_its_options(command: str) -> None:
    shown = command_help(command)
    for key in setting_types(SCHEMAS[command]):
        if command == "pretrain" or not key.startswith("data."):  # elsewhere data is null and shows no settings
            assert f"  {key}=" in shown or f"  {key}." in shown, key
    for group in groups(command):
        for option in options(group):
            assert f"  {group}={option} " in shown
    assert "backbone=vit_tiny_patch16_224" in shown or command != "pretrain"


@pytest.mark.parametrize(
    "example", [line for lines in EXAMPLES.values() for line in lines if line.startswith("heatssl ")]
)
def test_the_examples_of_the_help_compose(example: str) -> None:
    from heatssl.composition import compose

    _, command, *words = example.split()
    assert compose(command, settings(command, words)) is not None


def test_a_mistake_is_one_line_on_stderr_and_exit_code_2(tmp_path: Path) -> None:
    done = heatssl("pretrain", "trainer.step=3", folder=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "heatssl: error: unknown key 'trainer.step': did you mean 'trainer.steps'?\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "a refused command leaves nothing behind"


def test_an_unknown_command_names_the_known_ones() -> None:
    done = heatssl("pretrian")
    assert done.returncode == 2
    assert "pretrain" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize("command", ["knn", "probe", "attribute", "report"])
def test_a_missing_run_folder_is_one_line(command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([command, f"run={tmp_path / 'nowhere'}"]) == 2
    assert re.fullmatch(r"heatssl: error: [^\n]*nowhere[^\n]*\n", capsys.readouterr().err)
    assert list(tmp_path.iterdir()) == []


def raising(error: BaseException, cause: BaseException | None = None) -> cli.Callable[[], None]:
    """A command that fails."""

    def work() -> None:
        raise error from cause

    return work


def test_success_is_exit_code_0() -> None:
    assert cli.guarded(lambda: None) == 0


def test_line_breaks_in_an_error_do_not_reach_the_user(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.guarded(raising(UserError("no\n  such thing"))) == 2
    assert capsys.readouterr().err == "heatssl: error: no such thing\n"


@pytest.mark.parametrize(
    ("command", "told"),
    [
        ("pretrain", "goes on from the last checkpoint (resume=auto)"),
        ("finetune", "goes on after the last epoch"),
        ("knn", "begins again"),
    ],
)
def test_an_interrupt_says_what_the_same_command_does(
    command: str, told: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """``resume=auto`` is a setting of pretrain alone."""
    monkeypatch.setattr(cli, "run", lambda *_: raising(KeyboardInterrupt())())
    assert cli.main([command]) == 130
    assert capsys.readouterr().err == f"heatssl: error: interrupted; the same command {told}\n"


@pytest.mark.parametrize(
    ("error", "cause", "place"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "/full/last.ckpt"), None, "/full/last.ckpt"),
        (OSError(errno.EDQUOT, "Disk quota exceeded", "/full/x"), None, "/full/x"),
        (
            RuntimeError("write failed"),
            OSError(errno.ENOSPC, "No space left on device", "/full/y"),
            "/full/y",
        ),
        (RuntimeError("I/O error: No space left on device (os error 28)"), None, "the output folder"),
    ],
)
def test_a_full_disk_is_one_line_that_says_where_and_what_then(
    error: Exception, cause: Exception | None, place: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.guarded(raising(error, cause)) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"heatssl: error: no space left on device at {place}: free some space")
    assert told.count("\n") == 1


def test_a_really_full_device_is_recognised(capsys: pytest.CaptureFixture[str]) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("this system has no /dev/full")

    def work() -> None:
        with Path("/dev/full").open("w") as full:
            full.write("x")

    assert cli.guarded(work) == 2
    assert "no space left on device" in capsys.readouterr().err


def test_a_bug_stays_a_traceback() -> None:
    """One line for an error that is ours would hide what a bug report needs."""
    with pytest.raises(ZeroDivisionError):
        cli.guarded(lambda: print(1 // 0))


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HEATSSL_DEBUG", "1")
    assert cli.guarded(raising(UserError("wrong"))) == 2
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize("tool", ["pretrain", "linear_probe", "attribute"])
def test_the_tools_are_the_commands(tool: str, root: Path, tmp_path: Path) -> None:
    """torchrun and SLURM start files, not console scripts."""
    words = [sys.executable, str(root / "tools" / f"{tool}.py"), "zzz=1"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, check=False)
    command = {"linear_probe": "probe"}.get(tool, tool)
    assert done.returncode == 2
    assert f"heatssl {command} --help" in done.stderr
