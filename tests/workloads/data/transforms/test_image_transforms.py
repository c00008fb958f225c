import math

import numpy as np
import pytest
import torch
from PIL import Image

from workloads.data.keys import uniform
from workloads.data.transforms.image import CROP_TRIES, draw, execute, normalise
from workloads.data.views import View

RNG = np.random.default_rng(0)
CROP = {"crop_scale": (0.2, 1.0)}


def noise(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), np.uint8)


def ramp(height: int, width: int) -> np.ndarray:
    """Smooth: two ways to resample it agree."""
    x, y = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return np.stack([x, y, 255 - x], axis=2).astype(np.uint8)


def reference_crop(width, height, draws, view):
    """torchvision's RandomResizedCrop.get_params, reading its random numbers from `draws`."""
    shares, ratios = draws[4 : 4 + CROP_TRIES], draws[4 + CROP_TRIES :]
    low, high = math.log(view.crop_ratio[0]), math.log(view.crop_ratio[1])
    for share, ratio in zip(shares, ratios, strict=True):
        area = width * height * (view.crop_scale[0] + share * (view.crop_scale[1] - view.crop_scale[0]))
        aspect = math.exp(low + ratio * (high - low))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            return [int(draws[0] * (width - w + 1)), int(draws[1] * (height - h + 1)), w, h]
    if width / height < view.crop_ratio[0]:
        w, h = width, round(width / view.crop_ratio[0])
    elif width / height > view.crop_ratio[1]:
        w, h = round(height * view.crop_ratio[1]), height
    else:
        w, h = width, height
    return [round((width - w) / 2), round((height - h) / 2), w, h]


@pytest.mark.parametrize("size", [(32, 32), (300, 200), (10, 400), (1, 1), (3, 2)])
def test_crop_is_torchvisions(size):
    view, keys = View(size=8, **CROP), torch.arange(300)
    geometry = draw(view, torch.tensor([size]).expand(300, 2), keys, "v")
    draws = uniform(keys, 2 * CROP_TRIES + 4, "v").tolist()
    assert geometry.crop.tolist() == [reference_crop(*size, row, view) for row in draws]


def test_draws_cover_what_the_view_says():
    view = View(size=8, flip=0.3, rotate_deg=20, crop_scale=(0.25, 0.75), crop_ratio=(0.9, 1.1))
    geometry = draw(view, torch.full((4000, 2), 200), torch.arange(4000))
    box = geometry.box
    area = (box[:, 2] - box[:, 0]) * (box[:, 3] - box[:, 1])
    assert box.dtype == torch.float32 and box.min() >= 0 and box.max() <= 1
    assert 0.245 < area.min() < 0.26 and 0.74 < area.max() < 0.755 and abs(area.mean() - 0.5) < 0.02
    assert abs(geometry.flip.float().mean() - 0.3) < 0.03
    assert -20 <= geometry.rotate_deg.min() < -19 and 19 < geometry.rotate_deg.max() <= 20


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(32, 16), (16, 40), (96, 48)])
def test_views_of_another_shape_are_the_crop_resized(size, interpolation):
    image = ramp(60, 90)
    pixels, geometry = execute(View(size=size, interpolation=interpolation, **CROP), [image] * 8, torch.arange(8))
    assert pixels.shape == (8, 3, *size)
    for i, (x, y, w, h) in enumerate(geometry.crop.tolist()):
        how = Image.Resampling.BILINEAR if interpolation == "bilinear" else Image.Resampling.BICUBIC
        wanted = np.asarray(Image.fromarray(image[y : y + h, x : x + w]).resize(size[::-1], how)).astype(int)
        assert np.abs(wanted - pixels[i].permute(1, 2, 0).numpy()).max() <= 2


def test_without_a_crop_the_largest_centred_part_of_the_shape_is_resized():
    for (height, width), (top, left, h, w) in {
        (100, 100): (0, 25, 100, 50),
        (100, 30): (20, 0, 60, 30),
        (64, 32): (0, 0, 64, 32),
    }.items():
        image = ramp(height, width)
        pixels, geometry = execute(View(size=(64, 32)), [image])
        assert geometry.crop.tolist() == [[left, top, w, h]]
        wanted = np.asarray(Image.fromarray(image[top : top + h, left : left + w]).resize((32, 64), 2)).astype(int)
        assert np.abs(wanted - pixels[0].permute(1, 2, 0).numpy()).max() <= 1


def test_sizes():
    assert View(size=(8, 8)) == View(size=8) and View(size=[8, 4]).size == (8, 4)
    assert View.model_validate_json(View(size=(8, 4)).model_dump_json()).size == (8, 4)
    with pytest.raises(ValueError, match="expected a square that turns"):
        View(size=(8, 4), rotate_deg=5)
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        View(size=(8, 0))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [16, 32, 64, (32, 16), (64, 32)])
def test_a_sample_does_not_depend_on_its_batch(size, interpolation):
    rotate_deg = 15 if isinstance(size, int) else 0
    view = View(size=size, flip=0.5, rotate_deg=rotate_deg, interpolation=interpolation, **CROP)
    images = [noise(32, 32) for _ in range(20)] + [noise(40, 70), noise(20, 16), noise(300, 200), noise(32, 32)]
    keys = torch.arange(len(images)) * 7919
    together, geometry = execute(view, images, keys, "v")
    for i, image in enumerate(images):
        alone, one = execute(view, [image], keys[i : i + 1], "v")
        assert torch.equal(alone[0], together[i]), i
        assert torch.equal(one.box[0], geometry.box[i])
    backwards, _ = execute(view, images[::-1], keys.flip(0), "v")
    assert torch.equal(backwards.flip(0), together)


def test_salts_and_keys_give_independent_views():
    view, images = View(size=16, **CROP), [noise(32, 32)] * 4
    keys = torch.arange(4)
    a, b = execute(view, images, keys, "a")[0], execute(view, images, keys, "b")[0]
    assert not torch.equal(a, b) and not torch.equal(a[0], a[1])
    assert torch.equal(a, execute(view, images, keys, "a")[0])


@pytest.mark.parametrize("shape", [(60, 40), (24, 24), (20, 28)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_equal_pillow(shape, interpolation):
    """Shrinking is antialiased, enlarging stops at the edge of the crop: both as Pillow does."""
    view, image = View(size=24, interpolation=interpolation, **CROP), ramp(*shape)
    keys = torch.arange(40)
    pixels, geometry = execute(view, [image] * 40, keys)
    for i, (x, y, w, h) in enumerate(geometry.crop.tolist()):
        cut = Image.fromarray(image).crop((x, y, x + w, y + h))
        expected = np.asarray(cut.resize((24, 24), getattr(Image.Resampling, interpolation.upper()))).astype(int)
        assert abs(pixels[i].permute(1, 2, 0).numpy().astype(int) - expected).max() <= 2, (i, x, y, w, h)


def test_a_plain_view_takes_the_centred_square():
    image = noise(30, 50)
    pixels, geometry = execute(View(size=30), [image])
    assert torch.equal(pixels[0], torch.from_numpy(image[:, 10:40]).permute(2, 0, 1))
    assert geometry.box[0].tolist() == pytest.approx([0.2, 0, 0.8, 1])
    half, _ = execute(View(size=15), [image])
    square = Image.fromarray(image[:, 10:40]).resize((15, 15), Image.Resampling.BILINEAR)
    assert abs(half[0].permute(1, 2, 0).numpy().astype(int) - np.asarray(square)).max() <= 1


def test_flip_mirrors_left_and_right():
    image = noise(8, 8)
    pixels, geometry = execute(View(size=8, flip=1.0), [image], torch.arange(1))
    assert geometry.flip.all() and torch.equal(pixels[0], torch.from_numpy(image[:, ::-1].copy()).permute(2, 0, 1))


def test_rotation_is_counter_clockwise_about_the_centre_with_black_corners():
    image, keys = ramp(32, 32), torch.arange(12)
    pixels, geometry = execute(View(size=32, rotate_deg=90), [image] * 12, keys)
    for i, degrees in enumerate(geometry.rotate_deg.tolist()):
        expected = np.asarray(Image.fromarray(image).rotate(degrees, Image.Resampling.BILINEAR)).astype(int)
        middle = slice(10, 22)
        difference = abs(pixels[i].permute(1, 2, 0).numpy().astype(int) - expected)[middle, middle]
        assert difference.max() <= 2, degrees
        if 30 < abs(degrees) < 60:
            assert pixels[i, :, 0, 0].tolist() == [0, 0, 0]


def test_a_view_that_draws_needs_keys():
    with pytest.raises(AssertionError, match="keys"):
        execute(View(size=8, flip=0.5), [noise(8, 8)])


def test_no_images_give_an_empty_batch():
    pixels, geometry = execute(View(size=8, flip=0.5, rotate_deg=5, **CROP), [], torch.empty(0, dtype=torch.int64))
    assert pixels.shape == (0, 3, 8, 8) and geometry.box.shape == (0, 4)


def test_normalise_by_channel():
    view = View(size=2, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.tensor([0, 255], dtype=torch.uint8)[:, None, None, None].expand(2, 3, 2, 2)
    pixels = normalise(images, view)
    assert pixels.dtype == torch.float32
    assert pixels[:, :, 0, 0].tolist() == [[-1, -1, 0], [1, 3, 1]]
