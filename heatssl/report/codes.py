"""Maps as 8-bit codes inside PNG data URIs: a picture to look at without a script, and numbers to read with one.

A code c stands for low + c / 255 (high - low). The palette gives each code the colour of its value, so the browser
draws the map by itself; ``gallery.js`` inflates the same bytes when it is asked for the value under the pointer.
"""

import base64
import struct
import zlib
from dataclasses import dataclass

import numpy as np

from heatssl.report.colour import lookup_table

SIGNATURE = b"\x89PNG\r\n\x1a\n"
BRIGHTEST = 0.995  # quantile of a map's magnitudes that gets the brightest colour, as in the overlays
LARGEST = 64  # positions along a side: finer maps are averaged over blocks


@dataclass
class Coded:
    """A map in 8 bits."""

    source: str  # data URI
    low: list[float]  # what code 0 stands for, per channel
    high: list[float]  # what code 255 stands for
    block: int  # each position is the mean over so many positions of the map, squared


def code_map(values: np.ndarray, brightest: float | None = None) -> Coded:
    """A map (h, w) of any sign: its magnitude from 0, dark, to ``brightest``; the codes reach over all its values.

    None: only the largest half per cent of its magnitudes are brighter.
    """
    values, block = block_means(values)
    codes, low, high = quantise(values)
    if brightest is None:
        brightest = float(np.quantile(np.abs(values), BRIGHTEST)) or float(np.abs(values).max())
    magnitude = np.abs(low + np.arange(256) / 255 * (high - low))
    palette = lookup_table("inferno")[np.rint(np.clip(magnitude / max(brightest, 1e-30), 0, 1) * 255).astype(int)]
    return Coded(png(codes, palette), [low], [high], block)


def code_colours(values: np.ndarray, low: list[float], high: list[float]) -> Coded:
    """A map (h, w, 3) as red, green and blue; values outside [low, high] take its nearest end."""
    values, block = block_means(values)
    span = np.asarray(high) - np.asarray(low)
    share = (values - low) / np.where(span > 0, span, 1.0)
    return Coded(png(np.rint(255 * np.clip(share, 0, 1)).astype(np.uint8)), low, high, block)


def quantise(values: np.ndarray) -> tuple[np.ndarray, float, float]:
    """Codes (h, w) uint8, and what 0 and 255 stand for: off by (high - low) / 510 at most."""
    low, high = float(values.min()), float(values.max())
    span = high - low or 1.0
    return np.rint(255 * ((values - low) / span)).astype(np.uint8), low, high


def block_means(values: np.ndarray) -> tuple[np.ndarray, int]:
    """The map in float64, averaged over the smallest square blocks that leave at most ``LARGEST`` along a side.

    A last block that is not full is averaged over what there is.
    """
    values = values.astype(np.float64)
    rows, columns = values.shape[:2]
    block = -(-max(rows, columns) // LARGEST)
    if block == 1:
        return values, 1
    for axis in (0, 1):
        starts = np.arange(0, values.shape[axis], block)
        sizes = np.diff([*starts, values.shape[axis]])
        sums = np.add.reduceat(values, starts, axis=axis)
        values = sums / sizes.reshape([-1 if i == axis else 1 for i in range(values.ndim)])
    return values, block


def png(codes: np.ndarray, palette: np.ndarray | None = None) -> str:
    """Codes (h, w) uint8 with a palette (256, 3), or (h, w, 3) as they are, as a PNG's data URI.

    Written here, so that every row is unfiltered and a script needs ten lines to read it (RFC 2083).
    """
    rows, columns = codes.shape[:2]
    header = struct.pack(">IIBBBBB", columns, rows, 8, 2 if palette is None else 3, 0, 0, 0)
    unfiltered = np.pad(codes.reshape(rows, -1), ((0, 0), (1, 0)))
    chunks = [(b"IHDR", header)]
    if palette is not None:
        chunks.append((b"PLTE", palette.tobytes()))
    chunks += [(b"IDAT", zlib.compress(unfiltered.tobytes(), 9)), (b"IEND", b"")]
    written = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)) for kind, body in chunks
    )
    return f"data:image/png;base64,{base64.b64encode(SIGNATURE + written).decode()}"
