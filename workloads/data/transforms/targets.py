"""What follows an image view: masks, boxes and patches go through the geometry that was drawn for the pixels.

Positions are mapped in float64 and by element, so a sample's targets do not depend on its batch. In a view, as in an
image, pixel i spans i to i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from workloads.data.records import Annotation, MediaError, boxes, mask
from workloads.data.transforms.image import Geometry
from workloads.data.views import Size, height_width

NO_LABEL = -1  # fills the rows of a sample that has fewer boxes than others


class MaskView(BaseModel):
    """The class of each pixel of an image view.

    Attributes:
        member: suffix of the shard member that holds the mask.
        follows: name of the image view.
        fill: class of what the image does not cover: the corners of a rotated view.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "seg.png"
    follows: str = "image"
    fill: int = 255


class BoxesView(BaseModel):
    """The boxes that can be seen in an image view.

    Attributes:
        member: suffix of the shard member that holds the boxes.
        follows: name of the image view.
        most: rows of the result; of more boxes the largest are kept.
        min_visible: share of a box's area that must lie in the view; below, the box is dropped.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "json"
    follows: str = "image"
    most: int = Field(default=100, ge=1)
    min_visible: float = Field(default=0.25, ge=0, le=1)


def execute_masks(view: MaskView, data: Sequence[bytes], geometry: Geometry, size: Size) -> Tensor:
    """Looks at encoded masks through an image view's geometry: int64 [B, H, W]; see `render_masks`."""
    return render_masks(view, [mask(member) for member in data], geometry, size)


def execute_boxes(view: BoxesView, data: Sequence[bytes], geometry: Geometry, size: Size) -> tuple[Tensor, Tensor]:
    """Looks at encoded boxes through an image view's geometry: float32 [B, most, 4], int64 [B, most]."""
    return render_boxes(view, [boxes(member) for member in data], geometry, size)


def to_image(geometry: Geometry, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions of the view lie in the image.

    Args:
        geometry: of the view.
        points: [B, N, 2], x and y relative to the view, 0..1.

    Returns:
        float64 [B, N, 2], x and y in pixels of the image, and bool [B, N], whether the view shows the image there:
        false in the corners that a rotation leaves black.
    """
    points = _turn(points.double(), geometry.rotate_deg)
    seen = ((points >= 0) & (points < 1)).all(dim=2)
    points = _mirror(points, geometry.flip)
    crop = geometry.crop.double()[:, None]
    return crop[..., :2] + points * crop[..., 2:], seen


def to_view(geometry: Geometry, points: Tensor) -> tuple[Tensor, Tensor]:
    """Where positions of the image lie in the view: the inverse of `to_image`.

    Args:
        geometry: of the view.
        points: [B, N, 2], x and y in pixels of the image.

    Returns:
        float64 [B, N, 2], x and y relative to the view, and bool [B, N], whether the view shows them.
    """
    crop = geometry.crop.double()[:, None]
    cut = (points.double() - crop[..., :2]) / crop[..., 2:]
    turned = _turn(_mirror(cut, geometry.flip), -geometry.rotate_deg)
    return turned, ((cut >= 0) & (cut < 1) & (turned >= 0) & (turned < 1)).all(dim=2)


def _mirror(points: Tensor, flip: Tensor) -> Tensor:
    x, y = points.unbind(2)
    return torch.stack([torch.where(flip[:, None], 1 - x, x), y], dim=2)


def _turn(points: Tensor, degrees: Tensor) -> Tensor:
    """Where a view that is rotated counter-clockwise by `degrees` looks for its pixels; y points down."""
    x, y = (points - 0.5).unbind(2)
    sin, cos = (f(torch.deg2rad(degrees))[:, None] for f in (torch.sin, torch.cos))
    return torch.stack([cos * x - sin * y, sin * x + cos * y], dim=2) + 0.5


def _row(geometry: Geometry, i: int) -> Geometry:
    rows = slice(i, i + 1)
    return Geometry(geometry.size[rows], geometry.crop[rows], geometry.flip[rows], geometry.rotate_deg[rows])


def render_masks(view: MaskView, masks: Sequence[NDArray[np.int32]], geometry: Geometry, size: Size) -> Tensor:
    """Cuts, resizes (nearest), flips and rotates class masks as the image view did its pixels.

    Args:
        view: what to fill with.
        masks: B arrays of integers [H, W], of the sizes of the images.
        geometry: of the image view.
        size: of the image view.

    Returns:
        int64 [B, H, W].

    Raises:
        MediaError: a mask is not of its image's size.
    """
    H, W = height_width(size)
    down, across = ((torch.arange(n).double() + 0.5) / n for n in (H, W))
    result = torch.empty(len(masks), H, W, dtype=torch.int64)
    for i, classes in enumerate(masks):
        row = _row(geometry, i)
        _expect_size(classes.shape[1], classes.shape[0], row, "mask")
        if row.rotate_deg[0] == 0:  # columns and rows can be looked up apart
            places = (torch.stack([each, each], dim=1)[None] for each in (across, down))
            x, y = (to_image(row, each)[0][0, :, axis] for axis, each in enumerate(places))
            x, y, seen = x[None], y[:, None], torch.tensor(True)
        else:
            grid = torch.stack(torch.meshgrid(across, down, indexing="xy"), dim=2)  # [H, W, 2]
            points, seen = to_image(row, grid.reshape(1, -1, 2))
            x, y = points[0].reshape(H, W, 2).unbind(2)
            seen = seen.reshape(H, W)
        # A position on the right edge of the crop, after rounding, belongs to the last pixel.
        left, top, w, h = row.crop[0].tolist()
        x, y = x.floor().long().clamp(left, left + w - 1), y.floor().long().clamp(top, top + h - 1)
        result[i] = torch.where(seen, torch.from_numpy(classes)[y, x].long(), view.fill)
    return result


def render_boxes(
    view: BoxesView, annotations: Sequence[Annotation], geometry: Geometry, size: Size
) -> tuple[Tensor, Tensor]:
    """Moves boxes into an image view, clips them and drops those of which too little is left.

    A box in a rotated view becomes the upright box around its corners. What is less than a pixel wide or high is
    dropped.

    Args:
        view: how many boxes, and when one is dropped.
        annotations: of B images.
        geometry: of the image view.
        size: of the image view.

    Returns:
        float32 [B, most, 4], x1, y1, x2, y2 in pixels of the view, zeros where there is no box; int64 [B, most] labels,
        -1 where there is none. Boxes keep their order.

    Raises:
        MediaError: the boxes were drawn on an image of another size.
    """
    far = torch.tensor(height_width(size)[::-1])  # the corner at the right below
    placed = torch.zeros(len(annotations), view.most, 4)
    labels = torch.full((len(annotations), view.most), NO_LABEL)
    for i, annotation in enumerate(annotations):
        row = _row(geometry, i)
        _expect_size(annotation.width, annotation.height, row, "file of boxes")
        corners = torch.tensor(annotation.boxes, dtype=torch.float64).reshape(-1, 4)
        points = corners[:, [0, 1, 2, 1, 0, 3, 2, 3]].reshape(1, -1, 2)
        points = to_view(row, points)[0].reshape(-1, 4, 2) * far  # [N, 4, 2]
        whole = torch.cat([points.amin(dim=1), points.amax(dim=1)], dim=1)
        clipped = whole.clamp(torch.zeros(4), far.repeat(2))
        extent = clipped[:, 2:] - clipped[:, :2]
        area, whole_area = extent.prod(dim=1), (whole[:, 2:] - whole[:, :2]).prod(dim=1)
        kept = ((extent >= 1).all(dim=1) & (area >= view.min_visible * whole_area)).nonzero()[:, 0]
        kept = kept[area[kept].argsort(descending=True, stable=True)[: view.most]].sort().values
        placed[i, : len(kept)] = clipped[kept].float()
        labels[i, : len(kept)] = torch.tensor(annotation.labels, dtype=torch.int64)[kept]
    return placed, labels


def _expect_size(width: int | None, height: int | None, row: Geometry, what: str) -> None:
    expected = row.size[0].tolist()
    if (width or expected[0], height or expected[1]) != tuple(expected):
        raise MediaError(f"got a {what} of {width} x {height} for an image of {expected[0]} x {expected[1]} pixels")


def correspondence(a: Geometry, b: Geometry, grid: int, other_grid: int | None = None) -> tuple[Tensor, Tensor]:
    """Where the patches of one crop lie in another crop of the same images, for dense contrast between views.

    Args:
        a: the crop whose patches are looked for.
        b: the crop that they are looked for in.
        grid: patches on a side of `a`; there are P = grid * grid, row by row.
        other_grid: patches on a side of `b`; as `grid` where not given.

    Returns:
        float32 [B, P, 2], x and y of each patch's centre in patches of `b`: patch (r, c) spans c to c + 1 and r to
        r + 1, so `floor` names the patch; bool [B, P], whether both crops show that place.
    """
    centres = (torch.arange(grid, device=a.crop.device) + 0.5) / grid
    patches = torch.stack(torch.meshgrid(centres, centres, indexing="xy"), dim=2).reshape(1, -1, 2)  # [1, P, 2]
    places, in_a = to_image(a, patches.expand(len(a.crop), -1, -1))
    found, in_b = to_view(b, places)
    return (found * (other_grid or grid)).float(), in_a & in_b
