"""Small members beside the pixels: arrays, captions, boxes, class masks. Bytes -> checked values, or a MediaError.

Nothing that a member holds is executed, and its header is believed only as far as the bytes behind it go.
"""

from __future__ import annotations

import io
import math
from typing import Annotated, Any

import numpy as np
from numpy.lib import format as npy
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from workloads.data.decode import MAX_PIXELS, ImageError
from workloads.data.tarscan import MAX_LABEL

MAX_CAPTION_BYTES = 1 << 20
MAX_BOXES = 100_000


class MediaError(ImageError):
    """A member that is not what its suffix says, is damaged, or would take too much memory."""


def array(data: bytes) -> NDArray[Any]:
    """Reads an `.npy` file of numbers; a pickle is never loaded.

    Returns:
        A writable array of the file's shape, in C order and of native byte order. It takes no more memory than `data`.

    Raises:
        MediaError: no `.npy` file, one that holds something else than numbers, or one that is not whole.
    """
    file = io.BytesIO(data)
    try:
        version = npy.read_magic(file)
        if version not in ((1, 0), (2, 0)):  # 3.0 is for names of fields
            raise ValueError(f"version {version}")
        read_header = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
        shape, fortran_order, dtype = read_header(file)
    except Exception as error:  # the header is a Python literal: parsing it may raise whatever a tokenizer meets
        start = bytes(data[:8])
        raise MediaError(f"got {len(data)} bytes that start with {start!r} ({error}), expected an .npy file") from error
    if dtype.kind not in "biufc":
        raise MediaError(f"got an array of {dtype}, expected numbers; save it with another dtype")
    wanted, got = math.prod(shape) * dtype.itemsize, len(data) - file.tell()
    if min(shape, default=0) < 0 or wanted != got:
        raise MediaError(f"got {got} bytes behind a header of shape {shape} and {dtype}, expected {wanted}")
    try:
        values = np.ndarray(shape, dtype, data, file.tell(), order="F" if fortran_order else "C")
    except ValueError as error:  # (0, 10**30): no bytes, but no array either
        raise MediaError(f"got a header of shape {shape}, expected one of an array ({error})") from error
    return np.array(values, dtype.newbyteorder("="), order="C")


def captions(data: bytes) -> list[str]:
    """Reads captions, one a line, in UTF-8; blank lines are left out.

    Raises:
        MediaError: not UTF-8, longer than 1 MiB, or without any text.
    """
    if len(data) > MAX_CAPTION_BYTES:
        raise MediaError(f"got {len(data)} bytes of captions, expected at most {MAX_CAPTION_BYTES}")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise MediaError(f"got captions that are not UTF-8 ({error}); encode them again") from error
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if not lines:
        raise MediaError("got an empty file of captions, expected one caption a line")
    return lines


class Annotation(BaseModel):
    """Boxes of one image.

    Attributes:
        boxes: x1, y1, x2, y2 in pixels of the image.
        labels: class number of each box.
        width, height: of the image that the boxes were drawn on, where the file says so.
    """

    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)  # files hold much that is not needed here

    boxes: list[tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]] = Field(max_length=MAX_BOXES)
    labels: list[Annotated[int, Field(ge=0, le=MAX_LABEL)]] = Field(max_length=MAX_BOXES)
    width: int | None = None
    height: int | None = None


def boxes(data: bytes) -> Annotation:
    """Reads `{"boxes": [[x1, y1, x2, y2], ...], "labels": [0, ...]}`; other keys are ignored.

    Raises:
        MediaError: no such JSON, another number of labels than of boxes, or a box whose corners are swapped.
    """
    expected = 'expected {"boxes": [[x1, y1, x2, y2], ...], "labels": [class number, ...]}'
    try:
        found = Annotation.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise MediaError(f"got boxes that cannot be read ({where}: {first['msg']}), {expected}") from error
    if len(found.boxes) != len(found.labels):
        raise MediaError(f"got {len(found.boxes)} boxes and {len(found.labels)} labels, {expected}")
    for x1, y1, x2, y2 in found.boxes:
        if x2 < x1 or y2 < y1:
            raise MediaError(f"got the box {[x1, y1, x2, y2]}, expected x1 <= x2 and y1 <= y2 in pixels")
    return found


def mask(data: bytes, *, max_pixels: int = MAX_PIXELS) -> NDArray[np.int32]:
    """Reads the class number of each pixel from a PNG: grey of 1, 8 or 16 bits, or the indices of a palette.

    Returns:
        int32 [H, W].

    Raises:
        MediaError: no PNG, one of colours, a damaged one, or one of more than `max_pixels`.
    """
    try:
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.width * image.height > max_pixels:
                raise MediaError(f"got a mask of {image.width} x {image.height}, expected at most {max_pixels} pixels")
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise MediaError(f"got a mask of mode {image.mode}, expected one channel of class numbers; convert it")
            return np.array(image, dtype=np.int32)
    except MediaError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever their parsers meet: SyntaxError, struct.error, ...
        raise MediaError(f"got {len(data)} bytes that are no whole PNG ({error}), expected a class mask") from error
