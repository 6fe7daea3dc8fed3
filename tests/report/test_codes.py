"""Maps in 8 bits: what the gallery reads out is the map's own value, and what it shows is its colour."""

import base64
import io
import zlib

import numpy as np
import pytest
from PIL import Image

from heatssl.report.codes import LARGEST, block_means, code_colours, code_map, quantise
from heatssl.report.colour import colourise

MAPS = {
    "signed": np.random.default_rng(0).normal(size=(7, 9)),
    "tiny values": 1e-9 * np.random.default_rng(1).random((5, 5)),
    "one hot pixel": np.eye(1, 64, 3).reshape(8, 8) * 1e6,
    "float32": np.random.default_rng(2).normal(size=(4, 4)).astype(np.float32),
    "constant": np.full((3, 3), -2.5),
    "empty": np.zeros((2, 6)),
}


def _file(source: str) -> bytes:
    assert source.startswith("data:image/png;base64,")
    return base64.b64decode(source.partition(",")[2])


@pytest.mark.parametrize("name", MAPS)
def test_a_value_read_back_is_off_by_half_a_code_at_most(name: str) -> None:
    values = MAPS[name].astype(np.float64)
    codes, low, high = quantise(values)
    assert (low, high) == (values.min(), values.max())
    read = low + codes / 255 * (high - low)
    assert np.abs(read - values).max() <= (high - low) / 510 * (1 + 1e-9)


@pytest.mark.parametrize("name", MAPS)
def test_a_viewer_without_a_script_shows_the_magnitude_in_our_colours(name: str) -> None:
    """The palette follows |value|, so that minus and plus are as bright, and the rest of the page says which."""
    values = MAPS[name].astype(np.float64)
    brightest = float(np.quantile(np.abs(values), 0.9)) or 1.0
    coded = code_map(values, brightest)
    shown = np.asarray(Image.open(io.BytesIO(_file(coded.source))).convert("RGB")).astype(int)
    step = (values.max() - values.min()) / 510  # by which a code may be off
    wanted = np.stack([colourise(np.abs(values) + off, 0, brightest) for off in np.linspace(-step, step, 9)]).astype(
        int
    )
    assert (shown >= wanted.min(axis=0) - 3).all()
    assert (shown <= wanted.max(axis=0) + 3).all()


def test_a_fine_map_is_as_bright_as_a_coarse_one() -> None:
    """Means over blocks are smaller than the pixels: by the pixels' largest they would all be dark."""
    for side in (LARGEST, 4 * LARGEST):
        coded = code_map(np.random.default_rng(4).normal(size=(side, side)))
        shown = np.asarray(Image.open(io.BytesIO(_file(coded.source))).convert("RGB"))
        brightest = (shown == colourise(np.ones((1, 1)), 0, 1)).all(axis=2)
        assert 0.004 < brightest.mean() < 0.012


def test_rows_are_unfiltered_as_the_script_expects() -> None:
    """gallery.js skips one byte a row and takes the others for codes."""
    values = MAPS["signed"]
    file = _file(code_map(values, 1.0).source)
    start = file.index(b"IDAT")
    length = int.from_bytes(file[start - 4 : start])
    rows = np.frombuffer(zlib.decompress(file[start + 4 : start + 4 + length]), np.uint8).reshape(7, 10)
    assert (rows[:, 0] == 0).all()
    assert np.array_equal(rows[:, 1:], quantise(values)[0])


def test_fine_maps_are_averaged_over_square_blocks() -> None:
    values = np.random.default_rng(3).normal(size=(128, 2 * LARGEST + 2))
    means, block = block_means(values)
    assert block == 3
    assert means.shape == (43, 44)
    assert means[1, 2] == pytest.approx(values[3:6, 6:9].mean())
    assert means[-1, -1] == pytest.approx(values[126:, 129:].mean()), "the last block is not full"
    assert block_means(values[:64, :64])[1] == 1


def test_colours_keep_their_channels_and_end_at_the_range() -> None:
    values = np.array([[[-9.0, 0.0, 9.0], [1.0, -1.0, 0.5]]])
    coded = code_colours(values, [-2.0] * 3, [2.0] * 3)
    shown = np.asarray(Image.open(io.BytesIO(_file(coded.source))))
    assert shown[0, 0].tolist() == [0, 128, 255]
    assert np.abs(-2 + shown[0, 1] / 255 * 4 - values[0, 1]).max() <= 4 / 510
