import contextlib
import io
import struct
import subprocess
import sys
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from workloads.data.decode import ImageError, decode

RNG = np.random.default_rng(0)
SMOOTH = np.stack([*np.meshgrid(np.arange(48), np.arange(40)), np.full((40, 48), 90)], axis=2).astype(np.uint8) * 2


def png_header(width: int, height: int) -> bytes:
    """A PNG that says its size and holds nearly nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(99))) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("WEBP", {"lossless": True}), ("BMP", {}), ("PPM", {})])
def test_lossless_formats_come_back_exactly(encoded, kind, options):
    pixels = decode(encoded(SMOOTH, kind, **options))
    assert pixels.dtype == np.uint8 and pixels.flags.writeable
    assert (pixels == SMOOTH).all()


def test_jpeg_equals_pillow(encoded):
    data = encoded(SMOOTH, "JPEG", quality=90)
    reference = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    assert decode(data).shape == (40, 48, 3) and abs(decode(data) - reference).max() <= 3


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_grey_becomes_three_equal_channels(encoded, kind):
    pixels = decode(encoded(SMOOTH[:, :, 0], kind))
    assert pixels.shape == (40, 48, 3)
    assert (pixels[:, :, 0] == pixels[:, :, 2]).all() and abs(pixels[:, :, 0].astype(int) - SMOOTH[:, :, 0]).max() <= 3


def test_16_bits_are_scaled_not_clipped(encoded):
    wide = np.array([[0, 257, 128 * 257, 65535]], np.uint16)
    assert decode(encoded(wide))[0, :, 0].tolist() == [0, 1, 128, 255]


def test_palette_with_transparency_and_alpha(encoded):
    image = Image.fromarray(SMOOTH).convert("P")
    file = io.BytesIO()
    image.save(file, "PNG", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (decode(file.getvalue()) == np.asarray(image.convert("RGB"))).all()
    alpha = np.concatenate([SMOOTH, np.full((40, 48, 1), 7, np.uint8)], axis=2)
    assert (decode(encoded(alpha)) == SMOOTH).all()


def test_cmyk_jpeg_is_read_as_pillow_does():
    image = Image.new("CMYK", (16, 8), (0, 255, 255, 0))  # red
    file = io.BytesIO()
    image.save(file, "JPEG")
    assert abs(decode(file.getvalue())[0, 0].astype(int) - [255, 0, 0]).max() <= 8


def test_exif_rotation_is_not_applied(encoded):
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(encoded(SMOOTH, "JPEG", exif=exif)).shape == (40, 48, 3)


def test_a_giant_costs_nothing():
    """Address space is limited: an image of 50,000 x 50,000 that took memory would end the process."""
    code = (
        "import resource, sys; from workloads.data.decode import decode, ImageError\n"
        "limit = 2 << 30; resource.setrlimit(resource.RLIMIT_AS, (limit, limit))\n"
        "try: decode(sys.stdin.buffer.read())\n"
        "except ImageError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], input=png_header(50_000, 50_000), capture_output=True, check=True
    )
    assert b"pixels" in done.stdout and not done.stderr


@pytest.mark.parametrize(("width", "height"), [(9000, 9000), (50_000, 50_000), (12_000, 12_000), (1, 70_000_000)])
def test_too_many_pixels(width, height):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ImageError, match="64000000"):
            decode(png_header(width, height))


def test_limit_is_checked_for_jpeg_too(encoded):
    data = encoded(SMOOTH, "JPEG")
    assert decode(data, max_pixels=40 * 48).shape == (40, 48, 3)
    with pytest.raises(ImageError, match="got 48 x 40 pixels, expected at most 1919"):
        decode(data, max_pixels=40 * 48 - 1)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("share", [0.01, 0.3, 0.6, 0.9])
def test_truncated_images(encoded, kind, share):
    noise = RNG.integers(0, 256, (64, 64, 3), np.uint8)
    data = encoded(noise, kind)
    with pytest.raises(ImageError):
        decode(data[: int(len(data) * share)])


def test_damaged_jpeg_is_not_filled_with_grey(encoded):
    data = encoded(RNG.integers(0, 256, (64, 64, 3), np.uint8), "JPEG")
    middle = len(data) // 2
    with pytest.raises(ImageError, match="damaged JPEG"):
        decode(data[:middle] + bytes(400) + data[middle + 400 :])


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"no image", b"\x89PNG\r\n\x1a\n", b"GIF89a", b"<svg></svg>"])
def test_what_is_no_image(data):
    with pytest.raises(ImageError, match=r"got .*expected"):
        decode(data)


@settings(max_examples=150, deadline=None)
@given(kind=st.sampled_from(["JPEG", "PNG", "WEBP", "GIF", "TIFF"]), at=st.integers(0, 400), junk=st.binary(max_size=8))
def test_nothing_but_image_errors_comes_out(encoded, kind, at, junk):
    data = bytearray(encoded(SMOOTH, kind))
    data[at : at + len(junk)] = junk
    with contextlib.suppress(ImageError):
        assert decode(bytes(data)).shape[2] == 3
