import json
import tarfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workloads.data.decode import decode
from workloads.data.records import Annotation, MediaError, mask
from workloads.data.transforms.image import Geometry, draw, execute
from workloads.data.transforms.targets import (
    BoxesView,
    MaskView,
    correspondence,
    execute_boxes,
    execute_masks,
    render_boxes,
    render_masks,
    to_image,
    to_view,
)
from workloads.data.views import View

RECTANGLE = (30, 20, 70, 60)  # x1, y1, x2, y2 in an image of 120 x 90


def painted():
    """A white rectangle on black, its mask and its box."""
    x1, y1, x2, y2 = RECTANGLE
    classes = np.zeros((90, 120), np.int32)
    classes[y1:y2, x1:x2] = 5
    image = np.repeat((classes > 0)[:, :, None], 3, axis=2).astype(np.uint8) * 255
    return image, classes, Annotation(boxes=[tuple(map(float, RECTANGLE))], labels=[5])


@pytest.mark.parametrize(("size", "rotate_deg"), [(32, 0), (64, 0), (32, 40), (64, 40), ((64, 40), 0)])
def test_mask_and_box_match_the_pixels(size, rotate_deg):
    image, classes, annotation = painted()
    view = View(size=size, crop_scale=(0.3, 1), flip=0.5, rotate_deg=rotate_deg)
    keys, n = torch.arange(60), 60
    pixels, geometry = execute(view, [image] * n, keys, "v")
    masks = render_masks(MaskView(fill=0), [classes] * n, geometry, size)
    boxes, labels = render_boxes(BoxesView(most=3, min_visible=0), [annotation] * n, geometry, size)
    assert geometry.flip.any() and not geometry.flip.all()
    seen = 0
    for i in range(n):
        white = pixels[i, 0] > 127
        assert (white != (masks[i] == 5)).float().mean() < 0.02
        if masks[i].sum() < 50 * 5:
            continue
        seen += 1
        y, x = white.nonzero().unbind(1)
        around = torch.tensor([x.min(), y.min(), x.max() + 1, y.max() + 1])
        assert labels[i].tolist() == [5, -1, -1] and boxes[i, 1:].eq(0).all()
        low, high = (around - boxes[i, 0])[:2], (boxes[i, 0] - around)[2:]
        assert min(low.min(), high.min()) > -1.5, i
        # The upright box also surrounds corners that the crop of a rotated view has cut off.
        assert rotate_deg or max(low.max(), high.max()) < 1.5, i
    assert seen > 30


def test_what_a_rotated_view_does_not_cover_is_filled():
    view = View(size=16, rotate_deg=180)
    classes = np.ones((16, 16), np.int32)
    geometry = draw(view, torch.tensor([[16, 16]]), torch.zeros(1, dtype=torch.int64))
    geometry = Geometry(geometry.size, geometry.crop, geometry.flip, torch.tensor([45.0], dtype=torch.float64))
    masks = render_masks(MaskView(fill=255), [classes], geometry, 16)[0]
    assert masks[0, 0] == masks[15, 15] == 255 and masks[8, 8] == 1 and set(masks.unique().tolist()) == {1, 255}


def test_masks_of_an_identity_view_are_unchanged():
    classes = np.random.default_rng(0).integers(0, 9, (24, 24)).astype(np.int32)
    _, geometry = execute(View(size=24), [np.zeros((24, 24, 3), np.uint8)])
    assert torch.equal(render_masks(MaskView(), [classes], geometry, 24)[0], torch.from_numpy(classes).long())


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**40), st.sampled_from([0.0, 30.0, 180.0]))
def test_there_and_back(key, rotate_deg):
    view = View(size=8, crop_scale=(0.1, 1), flip=0.5, rotate_deg=rotate_deg)
    geometry = draw(view, torch.tensor([[300, 200]]), torch.tensor([key]))
    points = torch.rand(1, 50, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    places, seen = to_image(geometry, points)
    back, shown = to_view(geometry, places)
    assert torch.allclose(back, points, atol=1e-9) and torch.equal(seen, shown)
    assert rotate_deg or seen.all()


def test_patches_correspond_where_the_pixels_agree():
    """An image whose red is x and whose green is y says where each patch was looked at."""
    y, x = np.mgrid[:240, :240].astype(np.uint8)
    image = np.stack([x, y, 0 * x], axis=2)
    view, keys = View(size=56, crop_scale=(0.3, 0.6), flip=0.5), torch.arange(16)
    (_, a), (pixels_b, b) = execute(view, [image] * 16, keys, "a"), execute(view, [image] * 16, keys, "b")
    places, inside = correspondence(a, b, grid=7, other_grid=14)
    assert places.shape == (16, 49, 2) and places.dtype == torch.float32
    assert 0.2 < inside.float().mean() < 0.95 and (a.flip != b.flip).any()
    centres = ((torch.arange(7) + 0.5) / 7).double()
    for i in range(16):
        for patch in inside[i].nonzero()[:, 0].tolist():
            row, column = divmod(patch, 7)
            wanted = to_image(_one(a, i), torch.stack([centres[column], centres[row]])[None, None])[0][0, 0]
            c, r = (places[i, patch] * 4).floor().long().tolist()  # 56 / 14 pixels a patch
            assert (pixels_b[i, :2, r, c].double() - wanted).abs().max() < 5
    assert ((places >= 0) & (places < 14)).all(2)[inside].all()


def _one(geometry, i):
    return Geometry(*(getattr(geometry, name)[i : i + 1] for name in ("size", "crop", "flip", "rotate_deg")))


def test_a_crop_corresponds_to_itself():
    view = View(size=8, crop_scale=(0.1, 0.5), flip=0.5)
    geometry = draw(view, torch.tensor([[300, 200]] * 9), torch.arange(9))
    places, inside = correspondence(geometry, geometry, grid=4)
    column, row = torch.arange(16) % 4 + 0.5, torch.arange(16) // 4 + 0.5
    assert inside.all() and torch.allclose(places, torch.stack([column, row], dim=1).expand(9, -1, -1), atol=1e-5)


def test_boxes_are_clipped_dropped_and_kept_in_order():
    geometry = Geometry(
        torch.tensor([[100, 100]]), torch.tensor([[0, 0, 50, 50]]), torch.tensor([True]), torch.zeros(1).double()
    )
    annotation = Annotation(
        boxes=[(0, 0, 10, 10), (40, 0, 60, 10), (45, 0, 95, 10), (60, 60, 70, 70), (0, 0, 0, 9), (0, 0, 40, 40)],
        labels=[0, 1, 2, 3, 4, 5],
    )
    boxes, labels = render_boxes(BoxesView(most=4), [annotation], geometry, 100)
    assert labels.tolist() == [[0, 1, 5, -1]]  # 2: a tenth is left, 3: outside, 4: empty
    assert boxes[0].tolist() == [[80, 0, 100, 20], [0, 0, 20, 20], [20, 0, 100, 80], [0, 0, 0, 0]]
    _, labels = render_boxes(BoxesView(most=2), [annotation], geometry, 100)
    assert labels.tolist() == [[0, 5]]  # the largest, ties in their order


def test_targets_of_a_sample_do_not_depend_on_its_batch():
    image, classes, annotation = painted()
    view, keys = View(size=20, crop_scale=(0.2, 1), flip=0.5, rotate_deg=20), torch.arange(8)
    _, geometry = execute(view, [image] * 8, keys)
    masks = render_masks(MaskView(), [classes] * 8, geometry, 20)
    boxes, labels = render_boxes(BoxesView(), [annotation] * 8, geometry, 20)
    places, inside = correspondence(geometry, _flipped(geometry), 5)
    for i in range(8):
        one = _one(geometry, i)
        assert torch.equal(render_masks(MaskView(), [classes], one, 20)[0], masks[i])
        alone = render_boxes(BoxesView(), [annotation], one, 20)
        assert torch.equal(alone[0][0], boxes[i]) and torch.equal(alone[1][0], labels[i])
        alone = correspondence(one, _flipped(one), 5)
        assert torch.equal(alone[0][0], places[i]) and torch.equal(alone[1][0], inside[i])


def _flipped(geometry):
    return Geometry(geometry.size, geometry.crop, ~geometry.flip, geometry.rotate_deg)


def test_targets_of_another_size_are_refused(encoded):
    _, geometry = execute(View(size=8), [np.zeros((90, 120, 3), np.uint8)])
    with pytest.raises(MediaError, match="got a mask of 4 x 5 for an image of 120 x 90"):
        execute_masks(MaskView(), [encoded(np.zeros((5, 4), np.uint8))], geometry, 8)
    for member in ({"width": 120, "height": 91}, {"width": 90}):
        data = json.dumps({"boxes": [], "labels": [], **member}).encode()
        with pytest.raises(MediaError, match="got a file of boxes"):
            execute_boxes(BoxesView(), [data], geometry, 8)


def test_views_refuse_what_they_do_not_know():
    with pytest.raises(ValidationError):
        MaskView(fil=1)
    with pytest.raises(ValidationError):
        BoxesView(most=0)


def test_empty_batches():
    _, geometry = execute(View(size=8), [])
    assert execute_masks(MaskView(), [], geometry, 8).shape == (0, 8, 8)
    assert execute_boxes(BoxesView(most=3), [], geometry, 8)[0].shape == (0, 3, 4)


def members(shard, count):
    with tarfile.open(shard) as tar:
        names = [tar.next() for _ in range(2 * count)]
        return [tar.extractfile(name).read() for name in names]


def test_real_masks_and_boxes(data_folder):
    data = members(data_folder / "camvid" / "val-000000.tar", 3)
    images = [decode(image) for image in data[::2]]
    view, keys = View(size=96, crop_scale=(0.3, 1), flip=0.5), torch.arange(3)
    _, geometry = execute(view, images, keys)
    masks = execute_masks(MaskView(fill=11), data[1::2], geometry, 96)
    assert masks.min() >= 0 and masks.max() <= 11
    shares = torch.bincount(torch.from_numpy(mask(data[1])).flatten().long(), minlength=12) / mask(data[1]).size
    assert (torch.bincount(masks[0].flatten(), minlength=12) / 96**2 - shares).abs().max() < 0.3

    data = members(data_folder / "bccd" / "val-000000.tar", 3)
    images = [decode(image) for image in data[::2]]
    _, geometry = execute(View(size=480), images)
    boxes, labels = execute_boxes(BoxesView(), data[1::2], geometry, 480)
    for i in range(3):
        count = int((labels[i] >= 0).sum())
        assert 0 < count <= len(json.loads(data[2 * i + 1])["boxes"])
        assert boxes[i].min() >= 0 and boxes[i].max() <= 480 and (boxes[i, :count, 2] > boxes[i, :count, 0]).all()
