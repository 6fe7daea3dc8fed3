"""Files that are whole or untouched, and what a disk refuses in words that help."""

import errno
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from heatssl.errors import UserError


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file beside ``path`` and move it there: ``path`` always holds the old or the new one, whole.

    Its folder is made where it is missing.

    Raises:
        UserError: when the disk is full or cannot be written; the old file is intact then.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")  # two processes may write the same file
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with temporary.open("wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def is_half_written(path: Path) -> bool:
    """Whether a file is what a kill in the middle of :func:`write_atomically` has left."""
    return re.fullmatch(r".+\.\d+\.tmp", path.name) is not None and path.is_file()


def check_folder(folder: Path) -> None:
    """See that files can be written into a folder, whether it is there yet or not; nothing is written.

    Raises:
        UserError: naming what stands in the way.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise UserError(f"cannot write into {folder}, {there} is a file: choose another output=FOLDER")
    if not os.access(there, os.W_OK | os.X_OK):
        reason = os.strerror(errno.EACCES)
        raise UserError(f"cannot write {folder} ({reason}): fix its permissions, or choose another output=FOLDER")


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn a full, read-only or forbidden disk into a :class:`UserError` that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        code = _errno(error)
        if code in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no space left on device for {path} (what stood there before is intact): "
                "free space and run the same command again"
            ) from error
        if code in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            reason = os.strerror(code)
            raise UserError(
                f"cannot write {path} ({reason}): fix its permissions, or choose another output=FOLDER"
            ) from error
        raise


def _errno(error: BaseException | None) -> int | None:
    """The errno behind an exception: torch.save hides a failed write behind a RuntimeError of its own."""
    while error is not None:
        if isinstance(error, OSError):
            return error.errno
        error = error.__cause__ or error.__context__
    return None
