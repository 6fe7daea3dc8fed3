"""``heatssl``: one sub-command each, ``key=value`` settings behind it, and errors in one line.

Nothing heavy is imported before a command is known to run, so that help answers at once.
"""

import argparse
import errno
import importlib
import os
import select
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from heatssl import __version__
from heatssl.errors import UserError
from heatssl.help_text import SUMMARY, command_help, overview
from heatssl.words import LISTS, settings

FUNCTIONS = {
    "pretrain": "heatssl.training:pretrain",
    "probe": "heatssl.evaluation:run_probe",
    "knn": "heatssl.evaluation:run_knn",
    "finetune": "heatssl.evaluation:run_finetune",
    "segment": "heatssl.evaluation:run_segment",
    "detect": "heatssl.evaluation:run_detect",
    "health": "heatssl.evaluation:run_health",
    "evaluate": "heatssl.report.commands:run_evaluate",
    "attribute": "heatssl.report.commands:run_attribute",
    "report": "heatssl.report.commands:run_report",
    "export": "heatssl.export.commands:run_export",
    "models": "heatssl.backbones.table:print_models",
}
GOES_ON = {  # what the same command does after it was stopped; the others begin again
    "demo": "goes on from the last checkpoint (resume=auto)",
    "pretrain": "goes on from the last checkpoint (resume=auto)",
    "finetune": "goes on after the last epoch",
    "detect": "goes on after the last epoch",
    "probe": "begins again; with protocol=mae it goes on after the last epoch",
    "evaluate": "takes over what was measured",
}
EXIT_USER_ERROR = 2
EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
# Native libraries pass on nothing but the text.
DISK_FULL_WORDS = ("No space left on device", "os error 28", "Disk quota exceeded")


def main(arguments: list[str] | None = None) -> int:
    """Entry point of the console script: run one command line, return the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if not arguments:
        _parser().print_help()
        return 0
    command, *words = arguments
    if command not in SUMMARY or {"-h", "--help"} & set(words):
        _parser().parse_args(arguments)  # help, the version or a mistake: it does not come back
    return guarded(lambda: run(command, settings(command, words)), GOES_ON.get(command, "begins again"))


def run(command: str, overrides: list[str]) -> None:
    """Compose the configuration of a command and call it.

    Raises:
        UserError: when settings or data cannot work.
    """
    from heatssl.allocator import keep_freed_memory

    keep_freed_memory()
    if command == "demo":
        from heatssl.demo import run_demo

        run_demo(overrides)
        return
    from heatssl.composition import compose

    config = compose(command, overrides)
    _function(command)(config)


def guarded(work: Callable[[], None], once_more: str = "begins again") -> int:
    """Run ``work``; what users can mend ends in one line on stderr and an exit code, the rest in a traceback.

    ``once_more`` tells what the same command does the next time. ``HEATSSL_DEBUG=1`` shows the traceback always.
    """
    try:
        work()
    except UserError as error:
        return _complain(str(error), EXIT_USER_ERROR)
    except BrokenPipeError:
        if not _reader_is_gone():
            raise
        return EXIT_BROKEN_PIPE
    except KeyboardInterrupt:
        return _complain(f"interrupted; the same command {once_more}", EXIT_INTERRUPTED)
    except Exception as error:
        place = full_disk(error)
        if place is None:
            raise
        remedy = f"free some space and run the same command again; it {once_more}"
        return _complain(f"no space left on device at {place}: {remedy}", EXIT_USER_ERROR)
    return 0


def _reader_is_gone() -> bool:
    """Whether nobody reads what is printed any more, as in ``heatssl ... | head -1``; nothing is printed then."""
    if sys.__stdout__ is None:
        return False
    output = sys.__stdout__.fileno()
    asked = select.poll()
    asked.register(output, 0)  # an error is told of without being asked for
    if not any(found & select.POLLERR for _, found in asked.poll(0)):
        return False
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)  # or Python would complain at its end
    return True


def full_disk(error: BaseException) -> str | None:
    """Where the disk was full, when that is what lies behind ``error``."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_FULL:
            return str(cause.filename or "the output folder")
        if any(words in str(cause) for words in DISK_FULL_WORDS):
            return "the output folder"
    return None


def _chain(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        yield current
        current = current.__cause__ or current.__context__


def _complain(message: str, code: int) -> int:
    if os.environ.get("HEATSSL_DEBUG") == "1":
        traceback.print_exc()
    print(f"heatssl: error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _function(command: str) -> Callable[[Any], Any]:
    """The function behind a command; importing it is what takes seconds."""
    module, _, name = FUNCTIONS[command].partition(":")
    function: Callable[[Any], Any] = getattr(importlib.import_module(module), name)
    return function


def _parser() -> argparse.ArgumentParser:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="heatssl",
        usage="heatssl COMMAND [key=value ...]",
        description="Self-supervised vision pretraining with heat in the place of a large decoder.",
        epilog=overview(),
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"heatssl {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", help=argparse.SUPPRESS)
    for command, summary in SUMMARY.items():
        sub = commands.add_parser(
            command,
            usage=f"heatssl {command}{f' [{LISTS[command].upper()} ...]' if command in LISTS else ''} [key=value ...]",
            description=f"{summary[0].upper()}{summary[1:]}.",
            formatter_class=plain,
            allow_abbrev=False,
        )
        sub.add_argument("settings", nargs="*", metavar="key=value", help="settings, listed below")
        sub.format_help = _with_body(sub, command)  # type: ignore[method-assign]
    return parser


def _with_body(parser: argparse.ArgumentParser, command: str) -> Callable[[], str]:
    """Help whose body is made only when it is asked for."""
    plain_help = parser.format_help
    return lambda: f"{plain_help()}\n{command_help(command)}\n"


if __name__ == "__main__":
    sys.exit(main())
