"""What a method draws of some images, on one picture for people."""

from __future__ import annotations

import io
from collections.abc import Sequence

PIXELS = 96  # the longer side of a picture
GAP, LABEL = 6, 22


def contact_sheet(pictures: Sequence[dict[str, bytes]]) -> bytes:
    """A PNG with a row for each kind of picture and a column for each image.

    Args:
        pictures: of each image, by kind, as PNG; one image at least.
    """
    from PIL import Image, ImageDraw

    kinds = list(pictures[0])
    row = PIXELS + GAP + LABEL
    sheet = Image.new("RGB", (len(pictures) * (PIXELS + GAP) + GAP, len(kinds) * row), "white")
    draw = ImageDraw.Draw(sheet)
    for y, kind in enumerate(kinds):
        draw.text((GAP, y * row + 5), kind.replace("_", " "), fill="black")
        for x, of_image in enumerate(pictures):
            with Image.open(io.BytesIO(of_image[kind])) as image:
                scale = PIXELS / max(image.size)
                how = Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.LANCZOS  # own pixels are to be seen
                width, height = (max(1, round(side * scale)) for side in image.size)
                shown = image.convert("RGB").resize((width, height), how)
                sheet.paste(shown, (GAP + x * (PIXELS + GAP), y * row + LABEL))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()
