"""Pictures of a run as data URIs: what its objective saw and made of it, and the heatmaps."""

import base64
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from heatssl.report.colour import colourise, lookup_table
from heatssl.report.run_folder import RunFolder, is_number, weights_of

SMALL = 128  # pixels: up to here images are kept exactly and shown with visible pixels
LARGEST = 512  # pixels of an embedded picture; larger ones are scaled down
UNREADABLE = (
    OSError,
    ValueError,
    SyntaxError,
    Image.DecompressionBombError,
)  # what Pillow raises
PANELS = {
    "image": "original",
    "visible": "visible part",
    "reconstruction": "filled in",
    "from_rest": "painted from the mean",
    "law_residual": "law residual",
    "first_view": "one view",
    "second_view": "another view",
}


@dataclass
class Panel:
    """One picture: its data URI, its caption, and whether to scale it up with sharp pixels."""

    source: str
    caption: str
    pixelated: bool


@dataclass
class Scene:
    """One image of ``pictures.npz`` with its panels."""

    label: str
    panels: list[Panel]


@dataclass
class ResidualRange:
    """The colour bar shared by all residual maps."""

    low: str
    high: str
    bar: str  # data URI of a strip, dark to bright


@dataclass
class Heatmap:
    """One entry of ``attribution.json``; ``problem`` says why ``source`` is empty."""

    method: str
    target: str
    weights: str
    completeness: str
    source: str
    problem: str
    description: str


@dataclass
class HeatmapGroup:
    """All heatmaps of one image."""

    image: str
    label: str
    heatmaps: list[Heatmap]


def scenes(
    pictures: dict[str, np.ndarray], captions: dict[str, str], limit: int = 8
) -> tuple[list[Scene], ResidualRange | None]:
    """The first ``limit`` images with their panels; residual maps share one range, 0 to the largest shown."""
    if not pictures:
        return [], None
    count = min(limit, len(pictures["image"]))
    residual = pictures.get("law_residual")
    high = 0.0
    if residual is not None:
        finite = residual[:count][np.isfinite(residual[:count])]
        high = float(finite.max()) if finite.size else 0.0
    result = []
    for i in range(count):
        panels = []
        for name, caption in (PANELS | captions).items():
            if name not in pictures:
                continue
            pixels = pictures[name][i]
            if name == "law_residual":
                pixels = colourise(pixels.astype(float), 0.0, high)
            panels.append(
                Panel(
                    data_uri(Image.fromarray(np.ascontiguousarray(pixels))),
                    caption,
                    max(pixels.shape) <= SMALL,
                )
            )
        label = str(pictures["label"][i]) if "label" in pictures else ""
        result.append(Scene(label, panels))
    if residual is None:
        return result, None
    bar = data_uri(Image.fromarray(lookup_table("inferno")[None, ::2].copy()))
    return result, ResidualRange("0", f"{high:.3g}", bar)


def story(pictures: dict[str, np.ndarray]) -> tuple[str, str, dict[str, str]]:
    """Heading, explanation and captions of the pictures, as their objective has left them there."""
    try:
        told = json.loads(str(pictures["story"]))
        return str(told["heading"]), str(told["explanation"]), dict(told["captions"])
    except (KeyError, TypeError, ValueError):
        return "What the objective saw", "", {}


def heatmap_groups(run: RunFolder) -> list[HeatmapGroup]:
    """Heatmaps by image, in the order of ``attribution.json``."""
    groups: dict[str, HeatmapGroup] = {}
    for entry in run.maps:
        image, label = str(entry.get("image", "")), str(entry.get("label") or "")
        group = groups.setdefault(image, HeatmapGroup(image, label, []))
        group.heatmaps.append(_heatmap(run.path, entry, label or image))
    return list(groups.values())


def _heatmap(folder: Path, entry: dict[str, Any], subject: str) -> Heatmap:
    method, target = title_of(entry), str(entry.get("target", ""))
    error = entry.get("completeness_error")
    completeness = f"completeness error {100 * error:.2g}\u00a0%" if is_number(error) else ""
    source, problem = "", ""
    try:
        source = embed(folder, str(entry.get("file", "")))
    except UNREADABLE as broken:
        problem = f"{entry.get('file')} cannot be shown ({type(broken).__name__})"
    weights = weights_of(entry)
    description = f"{method} of {subject}, target {target}{weights and f', {weights}'}"
    return Heatmap(method, target, weights, completeness, source, problem, description)


def method_name(method: str) -> str:
    """What people call an attribution method."""
    name, _, base = method.partition(":")
    spoken = "Grad-CAM" if name == "gradcam" else name.replace("_", " ")
    return f"{spoken} of {'uniform heat' if base == 'uniform' else method_name(base)}" if base else spoken


def title_of(entry: dict[str, Any]) -> str:
    """The method of an entry of ``attribution.json``, and the options that were not its own."""
    return ", ".join(filter(None, [method_name(str(entry.get("method", ""))), entry.get("options")]))


def embed(folder: Path, file: str) -> str:
    """A picture of the run folder as a data URI.

    Raises:
        one of UNREADABLE: when it cannot be read, or lies outside the folder.
    """
    with Image.open(inside(folder, file)) as image:
        return data_uri(image.convert("RGB"))


def inside(folder: Path, file: str) -> Path:
    """A file of the run folder; a path that leads out of it is refused with a ValueError, as reports are shared."""
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError("outside the run folder")
    return path


def data_uri(image: Image.Image) -> str:
    """Small images exactly, as PNG; larger ones as WebP at a quality where the loss is not seen."""
    image.thumbnail((LARGEST, LARGEST))
    buffer = io.BytesIO()
    if max(image.size) <= SMALL:
        kind = "png"
        image.save(buffer, "PNG", optimize=True)
    else:
        kind = "webp"
        image.save(buffer, "WEBP", quality=88)
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
