"""Features on disk: what one command has extracted, no other extracts again.

The name of a file is a digest of all that its features depend on: weights, architecture, images, settings, libraries,
device, and the code that makes features of files. A change of any of them looks for another file: none is ever stale.
A file is written beside its place and moved there, whole; two processes that make the same one are no harm. Its
contents have a digest too: a file that fails it is made again. The least recently used go when all together exceed
``MOST_BYTES``; deleting the folder loses nothing but time.
"""

import contextlib
import hashlib
import logging
import os
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

import heatssl
from heatssl.cache_folder import cache_folder
from heatssl.errors import UserError
from heatssl.files import write_atomically

MOST_BYTES = 20 * 2**30  # of all files together

log = logging.getLogger(__name__)


def folder() -> Path:
    """Where the files are."""
    return cache_folder() / "features"


def load(key: str) -> tuple[Tensor, Tensor] | None:
    """Features (N, C) and labels (N,) under a key, mapped from disk and not read into memory at once.

    None when there are none; a damaged file is told of in one line, and counts as none.
    """
    path = _path(key)
    try:
        found = torch.load(path, mmap=True, weights_only=True)
        features, labels = found["features"], found["labels"]
        if found["digest"] != _digest(features, labels):
            raise ValueError("its contents are not what was written")
        os.utime(path)  # used last
    except (FileNotFoundError, NotADirectoryError):
        return None
    except Exception as error:  # noqa: BLE001 - files are broken in many ways
        reason = " ".join(str(error).split())[:100]
        log.warning("%s is damaged or cannot be read (%s): features are extracted again", path, reason)
        return None
    return features, labels


def keep(key: str, features: Tensor, labels: Tensor) -> None:
    """Write features (N, C) and labels (N,) for :func:`load`; what cannot be written is told of in one line."""
    contents = {"features": features, "labels": labels, "digest": _digest(features, labels)}
    try:
        folder().mkdir(parents=True, exist_ok=True)
        write_atomically(_path(key), lambda file: torch.save(contents, file))
        _make_room()
    except (OSError, UserError) as error:
        log.warning("features are not kept for the next command (%s); cache=false does without", error)


def _path(key: str) -> Path:
    return folder() / f"{key}.pt"


def _digest(features: Tensor, labels: Tensor) -> str:
    found = hashlib.sha256(f"{features.dtype} {tuple(features.shape)}".encode())
    for tensor in (features, labels):
        found.update(tensor.contiguous().numpy().data)
    return found.hexdigest()


def _make_room() -> None:
    """Remove the files that were used longest ago, while there are too many."""
    files = []
    for path in folder().iterdir():
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            state = path.stat()
            files.append((state.st_mtime, state.st_size, path))
    total = sum(size for _, size, _ in files)
    for _, size, path in sorted(files):
        if total <= MOST_BYTES:
            break
        path.unlink(missing_ok=True)
        total -= size


@lru_cache(maxsize=1)
def code() -> str:
    """Digest of what makes features of files: the package's code for images and backbones, and its libraries."""
    package = Path(heatssl.__file__).parent
    rooms = [path for room in ("data", "backbones", "ops") for path in sorted((package / room).rglob("*.py"))]
    found = hashlib.sha256()
    readers = [package / "evaluation" / name for name in ("features.py", "readout.py")]
    for path in [*rooms, *readers]:
        found.update(path.read_bytes())
    found.update(" ".join(version(name) for name in ("torch", "torchvision", "timm", "pillow")).encode())
    return found.hexdigest()
