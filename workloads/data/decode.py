"""Encoded image bytes -> RGB pixels, or an ImageError; nothing else comes out of here."""

from __future__ import annotations

import io
import warnings
from typing import Any

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

MAX_PIXELS = 64_000_000
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF")

# Once for the process: `catch_warnings` around each image would not be safe between threads, and would make every
# warning of the program that is shown once appear again and again.
warnings.filterwarnings("ignore", module=r"PIL\.")


class ImageError(ValueError):
    """Bytes that are no image, a damaged image, or one with too many pixels."""


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.uint8]:
    """Decodes an image: JPEG, PNG, WebP, BMP, GIF and TIFF (first frame), PPM.

    Grey, palette and 16-bit images become 8-bit RGB (16 bits are scaled, not clipped), an alpha channel is
    dropped, EXIF rotation is not applied: pixels come as they are stored.

    Args:
        data: the encoded image.
        max_pixels: width * height above this is refused by the header, before any memory is taken.

    Returns:
        uint8 [H, W, 3], writable.

    Raises:
        ImageError: says what was got.
    """
    if bytes(data[:2]) == b"\xff\xd8":
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            _expect_size(*image.size, max_pixels)
            return _to_rgb(image)
    except ImageError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise ImageError(f"got far more pixels than {max_pixels} ({error}); make the image smaller") from error
    except UnidentifiedImageError as error:
        start = bytes(data[:8])
        expected = f"expected an image ({', '.join(FORMATS)})"
        raise ImageError(f"got {len(data)} bytes that start with {start!r}, {expected}") from error
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: SyntaxError, struct.error, ...
        raise ImageError(f"got an image that cannot be decoded ({error}), expected a whole one") from error


def _expect_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise ImageError(f"got {width} x {height} pixels, expected at most {max_pixels}; make the image smaller")


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    """None where Pillow should try: CMYK, and what libjpeg complains about though the data are whole."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data, strict=False)
        _expect_size(width, height, max_pixels)
        if colours in ("CMYK", "YCCK"):
            return None
        pixels: NDArray[np.uint8] = simplejpeg.decode_jpeg(data, "RGB")
        return pixels
    except ImageError:
        raise
    except (ValueError, KeyError) as error:  # KeyError: a header of unknown colours
        # Pillow would hide these two and fill the rest with grey.
        if str(error).startswith(("Corrupt JPEG", "Premature end")):
            raise ImageError(f"got a damaged JPEG ({error}), expected a whole one; encode it again") from error
        return None


def _to_rgb(image: Image.Image) -> NDArray[np.uint8]:
    if image.mode.startswith("I"):  # 16 bits, which Pillow's own conversion would clip at 255
        wide: NDArray[Any] = np.asarray(image).astype(np.int64).clip(0, 65535)
        return np.repeat(((wide * 255 + 32767) // 65535).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.mode == "F":
        raise ImageError("got floating-point pixels, whose range is unknown, expected 8 or 16 bits; convert the image")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # straight to RGB, Pillow warns
    return np.array(image.convert("RGB"))
