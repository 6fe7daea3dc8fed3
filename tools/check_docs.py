"""Check README and docs against the code: links lead somewhere, commands compose, Python blocks compile.

python tools/check_docs.py
"""

import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

from heatssl.composition import compose
from heatssl.errors import UserError
from heatssl.help_text import SUMMARY
from heatssl.words import settings

ROOT = Path(__file__).resolve().parent.parent
LINK = re.compile(r"\[[^\]]*\]\(([^)#\s]+)(?:#[^)]*)?\)")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def main() -> int:
    """Print each problem as ``file: what``; the exit code is 1 when there is one."""
    pages = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
    problems = [f"{page.relative_to(ROOT)}: {problem}" for page in pages for problem in page_problems(page)]
    print("\n".join(problems) or f"{len(pages)} pages checked")
    return 1 if problems else 0


def page_problems(page: Path) -> Iterator[str]:
    """What is wrong with one Markdown file."""
    text = page.read_text(encoding="utf-8")
    for target in LINK.findall(BLOCK.sub("", text)):
        if "://" not in target and not target.startswith("mailto:") and not (page.parent / target).exists():
            yield f"link to {target} leads nowhere"
    for language, block in BLOCK.findall(text):
        if language == "python":
            try:
                compile(block, str(page), "exec")
            except SyntaxError as error:
                yield f"Python block, line {error.lineno}: {error.msg}"
        else:
            yield from command_problems(block)


def command_problems(block: str) -> Iterator[str]:
    """``heatssl`` commands of a shell block that would be refused."""
    for line in block.replace("\\\n", " ").splitlines():
        words = line.strip().removeprefix("$ ").partition(" #")[0]
        if not words.startswith("heatssl "):
            continue
        _, command, *given = shlex.split(words)
        if command not in SUMMARY or "--help" in given:
            continue
        try:
            compose(command, settings(command, given))
        except UserError as error:
            yield f"{words}: {error}"


if __name__ == "__main__":
    sys.exit(main())
