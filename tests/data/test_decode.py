"""If these fail, some of a user's files turn black, white, sideways or bad without reason."""

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from heatssl.data.decode import decode, shown_size


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        ("L", "PNG"),
        ("L", "JPEG"),
        ("CMYK", "JPEG"),
        ("RGBA", "PNG"),
        ("P", "PNG"),
        ("1", "PNG"),
        ("LA", "PNG"),
        ("P", "GIF"),
    ],
)
def test_every_mode_becomes_the_rgb_that_a_viewer_shows(mode: str, kind: str) -> None:
    colour = Image.new("RGB", (16, 16), (200, 200, 200) if mode != "1" else (255, 255, 255))
    image = decode(encoded(colour.quantize(4) if mode == "P" else colour.convert(mode), kind))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image).astype(int) - np.asarray(colour)).max() < 6


def test_sixteen_bit_grey_keeps_its_range() -> None:
    ramp = np.linspace(0, 65535, 64, dtype=np.uint16).reshape(8, 8)
    shown = np.asarray(decode(encoded(Image.fromarray(ramp))))[..., 0]
    assert np.abs(shown.astype(int) - ramp // 257).max() <= 1


def test_a_wide_tiff_of_small_values_is_not_black() -> None:
    """Integers of 32 bits say nothing of white: values up to 255 are those of 8 bits, others those of 16."""
    for values, shown in (((0, 200), (0, 200)), ((0, 51400), (0, 200))):
        image = Image.fromarray(np.array([values], dtype=np.int32))
        assert np.asarray(decode(encoded(image, "TIFF")))[0, :, 0].tolist() == list(shown)


def test_a_dark_image_of_sixteen_bits_stays_dark() -> None:
    for kind in ("PNG", "PPM", "TIFF"):
        image = Image.fromarray(np.full((4, 4), 250, dtype=np.uint16))
        assert np.asarray(decode(encoded(image, kind))).max() == 1, kind


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_pixels_that_are_no_numbers_make_a_file_bad_and_not_black(value: float) -> None:
    pixels = np.full((4, 4), 0.5, dtype=np.float32)
    pixels[1, 2] = value
    with pytest.raises(ValueError, match="no numbers"):
        decode(encoded(Image.fromarray(pixels), "TIFF"))


def test_transparent_pixels_are_white() -> None:
    assert np.asarray(decode(encoded(Image.new("RGBA", (4, 4), (0, 0, 0, 0))))).min() == 255


def test_a_rotated_photograph_is_upright() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to view
    assert decode(encoded(Image.new("RGB", (30, 20)), "JPEG", exif=exif)).size == (20, 30)


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_a_truncated_file_is_an_error_and_not_half_grey(kind: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(pixels), kind)
    with pytest.raises(OSError, match="truncated"):
        decode(data[: len(data) // 2])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_of_an_animation_the_first_frame_is_shown(kind: str) -> None:
    frames = [Image.new("RGB", (20, 12), colour) for colour in ("red", "blue", "lime")]
    options = {} if kind == "TIFF" else {"duration": 40}
    shown = decode(encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options))
    assert shown.size == (20, 12)
    red, green, blue = np.asarray(shown).reshape(-1, 3).mean(axis=0)
    assert red > 240
    assert max(green, blue) < 15


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_exif_turns_other_formats_than_jpeg_too(kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = 8
    picture = Image.new("RGB", (30, 20), "blue")
    picture.paste("red", (0, 0, 15, 20))
    shown = np.asarray(decode(encoded(picture, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))))
    assert shown.shape == (30, 20, 3)
    assert shown[-1, 0, 0] > 200 > 50 > shown[0, 0, 0]  # what was left is below, turned by 90 degrees to the left


def test_cmyk_keeps_its_colours() -> None:
    """Inverted, as Adobe writes them, or not: a blue picture must not come out orange."""
    blue = Image.new("RGB", (16, 16), (20, 40, 200)).convert("CMYK")
    for kind in ("JPEG", "TIFF"):
        shown = np.asarray(decode(encoded(blue, kind))).reshape(-1, 3).mean(axis=0)
        assert shown[2] > 150 > 90 > shown[0], kind


@pytest.mark.parametrize("depth", ["colour", "grey with transparency"])
def test_sixteen_bits_a_channel_keep_their_range(depth: str) -> None:
    """Pillow writes neither, so the file is put together by hand."""
    ramp = np.linspace(0, 65535, 8).astype(int)
    opaque = np.full(8, 65535)
    channels = [ramp, ramp, ramp] if depth == "colour" else [ramp, opaque]
    shown = np.asarray(decode(png(np.stack(channels, axis=-1)[None], 2 if depth == "colour" else 4)))
    assert np.abs(shown[0, :, 0].astype(int) - ramp // 257).max() <= 1


def png(pixels: np.ndarray, colour_type: int) -> bytes:
    """A PNG of 16 bits a channel from (H, W, channels)."""

    def part(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width, _ = pixels.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", zlib.compress(rows)) + part(b"IEND", b"")


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (301, 7), (5, 5)])
@pytest.mark.parametrize("mode", ["RGB", "L", "1", "P"])
def test_odd_sizes_are_decoded(size: tuple[int, int], mode: str) -> None:
    assert decode(encoded(Image.new(mode, size, 1), "PNG")).size == size


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_a_broken_exif_does_not_cost_the_image() -> None:
    data = encoded(Image.new("RGB", (8, 8), "red"), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff broken")
    assert decode(data).size == (8, 8)


def test_a_damaged_note_on_how_it_was_taken_is_passed_over_in_silence(recwarn: pytest.WarningsRecorder) -> None:
    """The pixels are whole; Pillow's warning would be printed for every image, twice."""
    data = encoded(Image.new("RGB", (8, 6), "red"), "JPEG", exif=b"Exif\x00\x00II*\x00\x08\x00\x00\x00\x05\x00\x12\x01")
    assert decode(data).size == shown_size(data) == (8, 6)
    assert not recwarn.list
