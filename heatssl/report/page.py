"""What every page of heatssl's is made with, and how it is written: whole or not at all."""

from pathlib import Path

import jinja2

from heatssl.files import write_atomically


def environment() -> jinja2.Environment:
    """Templates of this package, everything put into them escaped."""
    return jinja2.Environment(
        loader=jinja2.PackageLoader("heatssl.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def write_page(path: Path, page: str) -> None:
    """Write a page beside its place and move it there.

    Raises:
        UserError: when it cannot be written; what stood there is intact.
    """
    write_atomically(path, lambda file: file.write(page.encode()))
