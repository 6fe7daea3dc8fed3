"""What every page of heatssl's is made with, and how it is written: whole or not at all."""

from pathlib import Path

import jinja2

from heatssl.errors import UserError


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
    half_written = path.with_name(path.name + ".tmp")
    try:
        half_written.write_text(page, encoding="utf-8")
        half_written.replace(path)
    except OSError as error:
        half_written.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error.strerror}; free some space or fix its permissions") from error
