"""What the backbone was shown, as pictures beside the maps; and a folder that shows nothing of it any more."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from heatssl.attribution.overlay import picture_of
from heatssl.attribution.pictures import Pictures, pixels
from heatssl.config import DataConfig
from heatssl.errors import UserError
from heatssl.files import write_atomically


def write_photos(folder: Path, pictures: Pictures, data: DataConfig) -> list[str]:
    """Each image as the backbone is shown it, named by its content: commands on other images leave it alone."""
    files = []
    for shown in pixels(pictures.images, data):
        path = folder / f"photo_{hashlib.sha256(shown.tobytes()).hexdigest()[:12]}.png"
        write_atomically(path, lambda file, shown=shown: Image.fromarray(shown).save(file, "PNG"))  # type: ignore[misc]
        files.append(f"{folder.name}/{path.name}")
    return files


def remove_photos(folder: Path) -> None:
    """Photos go, and overlays are drawn anew without them: those of earlier commands too, as a folder is shared whole.

    An overlay whose raw map an older heatssl has not kept goes as well, with its entry.

    Raises:
        UserError: when ``attribution.json`` is no list of heatmaps.
    """
    listed = folder / "attribution.json"
    if listed.exists():
        before = read_list(listed)
        after = {
            name: [{**entry, "photo": None} for entry in entries if _redrawn(folder.parent, entry)]
            for name, entries in before.items()
        }
        write_atomically(listed, lambda file: file.write(json.dumps(after, indent=2).encode()))
    for photo in folder.glob("photo_*.png"):
        photo.unlink()


def read_list(path: Path) -> dict[str, list[dict[str, Any]]]:
    """``attribution.json``: entries of ``maps`` and ``checkpoints``; empty when there is none.

    Raises:
        UserError: when it is no list of heatmaps.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"maps": []}
        return {name: [entry for entry in entries if entry["file"]] for name, entries in found.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a list of heatmaps ({error}): move it away and run the command again"
        ) from error


def _redrawn(run: Path, entry: dict[str, Any]) -> bool:
    """Whether an entry can stay: it shows no photo, or its map alone has been drawn in the place of both."""
    if entry.get("photo", "") is None:
        return True
    file = run / entry["file"]
    if not file.with_suffix(".npy").exists():
        file.unlink(missing_ok=True)
        return False
    with Image.open(file) as overlay:
        size = overlay.height
    picture = picture_of(np.load(file.with_suffix(".npy"), allow_pickle=False), None, size=size)
    write_atomically(file, lambda opened: picture.save(opened, "PNG"))
    return True
