"""A picture of pictures."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image

from tests import toy
from workloads.sheet import GAP, LABEL, PIXELS, contact_sheet


def png(grey: int) -> bytes:
    return toy.png(np.full((32, 32, 3), grey, np.uint8))


def test_tall_pictures_keep_their_shape() -> None:
    tall = toy.png(np.full((64, 32, 3), 10, np.uint8))
    sheet = Image.open(io.BytesIO(contact_sheet([{"a": tall}])))
    row = [sheet.getpixel((x, LABEL + PIXELS // 2)) for x in (GAP, GAP + PIXELS // 2 - 1, GAP + PIXELS // 2)]
    assert row == [(10, 10, 10)] * 2 + [(255, 255, 255)] and sheet.getpixel((GAP, LABEL + PIXELS - 1)) == (10, 10, 10)


def test_each_picture_is_in_its_place() -> None:
    sheet = Image.open(io.BytesIO(contact_sheet([{"a": png(10), "b": png(20)}, {"a": png(30), "b": png(40)}])))
    row = PIXELS + GAP + LABEL
    assert sheet.size == (2 * (PIXELS + GAP) + GAP, 2 * row)
    at = [(GAP + x * (PIXELS + GAP) + 5, LABEL + y * row + 5) for y in (0, 1) for x in (0, 1)]
    assert [sheet.getpixel(xy) for xy in at] == [(g, g, g) for g in (10, 30, 20, 40)]
