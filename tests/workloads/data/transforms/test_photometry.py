import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from pydantic import ValidationError

import workloads.models.timm_import  # noqa: F401 (torchvision may need it)
from workloads.data.keys import sample_keys, uniform
from workloads.data.transforms import photometry as ph
from workloads.data.transforms.photometry import Photometry, apply, draw

from torchvision.transforms.v2 import functional as tv  # isort: skip (after the fallback)

KEYS = sample_keys(0, 0, torch.arange(4000))
BYOL = Photometry(
    brightness=0.4,
    contrast=0.4,
    saturation=0.2,
    hue=0.1,
    jitter_p=0.8,
    gray_p=0.2,
    blur_p=0.5,
    solarize_p=0.2,
)
ALWAYS = BYOL.model_copy(update={"jitter_p": 1.0})


def noise(*shape: int) -> torch.Tensor:
    """Bytes with every special case of HSV: two or three channels are often equal."""
    return (uniform(torch.tensor([1]), int(np.prod(shape)), "noise").reshape(shape) * 8).long().mul(36).byte()


def column(values: list[float]) -> torch.Tensor:
    return torch.tensor(values)[:, None, None, None]


@pytest.mark.parametrize("name", ["brightness", "contrast", "saturation", "hue"])
def test_each_adjustment_is_torchvisions(name):
    images = noise(5, 3, 9, 11) / 255
    values = [-0.5, -0.1, 0.0, 0.3, 0.5] if name == "hue" else [0.0, 0.4, 1.0, 1.3, 2.0]
    ours = getattr(ph, f"adjust_{name}")(images, column(values))
    reference = getattr(tv, f"adjust_{name}")
    expected = torch.stack([reference(image, value) for image, value in zip(images, values, strict=True)])
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_hue_wraps():
    images = noise(2, 3, 8, 8) / 255
    full, half = (ph.adjust_hue(images, column([turn, -turn])) for turn in (1.0, 0.5))
    torch.testing.assert_close(full, images, atol=2e-6, rtol=0)
    torch.testing.assert_close(ph.adjust_hue(half, column([0.5, 0.5])), images, atol=2e-6, rtol=0)
    red = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1)
    assert ph.adjust_hue(red, column([1 / 3])).flatten().tolist() == pytest.approx([0, 1, 0], abs=1e-6)
    assert ph.adjust_hue(red, column([-1 / 3])).flatten().tolist() == pytest.approx([0, 0, 1], abs=1e-6)


@pytest.mark.parametrize(("size", "radius"), [((20, 17), 4), ((8, 5), 4), ((40, 40), 11)])
def test_blur_is_torchvisions_with_a_sigma_for_each_sample(size, radius):
    images, sigmas = noise(3, 3, *size) / 255, [0.1, 0.9, 2.0]
    ours = ph.blur(images, column(sigmas), radius)
    width = 2 * radius + 1
    expected = torch.stack([tv.gaussian_blur(i, [width, width], [s, s]) for i, s in zip(images, sigmas, strict=True)])
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=0)


def test_blur_wider_than_the_image_uses_the_mirror_once():
    image = noise(1, 3, 3, 3) / 255
    torch.testing.assert_close(ph.blur(image, column([2.0]), 11), ph.blur(image, column([2.0]), 2))


def test_thirteen_pixels_are_pillows_blur():
    bytes_ = noise(1, 3, 64, 64)
    image = Image.fromarray(bytes_[0].permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(2.0))
    pillow = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    ours = ph.blur(bytes_ / 255, column([2.0]), 6)[0]
    inner = (slice(None), slice(8, -8), slice(8, -8))  # Pillow repeats the border, and rounds
    assert (ours - pillow)[inner].abs().max() < 4 / 255
    assert abs((ours - pillow)[inner].mean()) < 0.5 / 255


def test_grayscale_and_solarize_are_torchvisions():
    images = noise(2, 3, 6, 7) / 255
    torch.testing.assert_close(ph.grayscale(images), tv.rgb_to_grayscale(images), atol=1e-6, rtol=0)
    assert torch.equal(ph.solarize(images, 0.5), tv.solarize(images, 0.5))


def test_the_whole_is_torchvision_with_the_drawn_numbers():
    images, keys = noise(24, 3, 30, 30), KEYS[:24]
    drawn = draw(BYOL, keys, "v")
    adjust = [tv.adjust_brightness, tv.adjust_contrast, tv.adjust_saturation, tv.adjust_hue]
    expected = []
    for i, image in enumerate(images / 255):
        if drawn.jitter[i]:
            for kind in drawn.order[i].tolist():
                image = adjust[kind](image, float(drawn.factors[i, kind]))
        if drawn.gray[i]:
            image = tv.rgb_to_grayscale(image, 3)
        if drawn.blur[i]:
            image = tv.gaussian_blur(image, [3, 3], [float(drawn.sigma[i])] * 2)
        expected.append(tv.solarize(image, 0.5) if drawn.solarize[i] else image)
    differs = (apply(BYOL, images, keys, "v") - torch.stack(expected)).abs() > 1e-5
    # Inversion at a threshold is not continuous: a value that lies on it may fall on either side.
    assert not differs[~drawn.solarize].any() and differs.float().mean() < 1e-3


def test_draws_have_torchvisions_distribution():
    drawn = draw(ALWAYS, KEYS, "v")
    for name, p in (("jitter", 1.0), ("gray", 0.2), ("blur", 0.5), ("solarize", 0.2)):
        assert getattr(drawn, name).double().mean() == pytest.approx(p, abs=0.03)
    ranges = [(0.6, 1.4), (0.6, 1.4), (0.8, 1.2), (-0.1, 0.1)]
    for values, (low, high) in zip([*drawn.factors.T, drawn.sigma], [*ranges, (0.1, 2.0)], strict=True):
        assert low <= values.min() < values.max() <= high
        standard = (values - low) / (high - low)
        assert standard.mean() == pytest.approx(1 / 2, abs=0.015)
        assert standard.var() == pytest.approx(1 / 12, abs=0.003)
    counts = {order: 0 for order in itertools.permutations(range(4))}
    for order in drawn.order.tolist():
        counts[tuple(order)] += 1
    assert max(abs(count - 4000 / 24) for count in counts.values()) < 4.5 * (4000 / 24) ** 0.5
    columns = torch.stack([drawn.gray, drawn.blur, drawn.solarize, *drawn.factors.T, drawn.sigma]).double()
    assert (torch.corrcoef(columns) - torch.eye(len(columns))).abs().max() < 0.06


def test_strong_jitter_has_no_negative_factor():
    factors = draw(Photometry(brightness=1.6), KEYS, "v").factors[:, 0]
    assert 0 <= factors.min() < 0.01 and 2.59 < factors.max() <= 2.6


def test_colour_is_independent_of_the_geometry_under_the_same_salt():
    flips = uniform(KEYS, 24, "v")[:, 2] < 0.5
    for name in ("gray", "blur", "solarize"):
        chosen = getattr(draw(BYOL, KEYS, "v"), name)
        assert abs(chosen[flips].double().mean() - chosen[~flips].double().mean()) < 0.04


@pytest.mark.parametrize("side", [5, 32, 64])
def test_a_sample_does_not_depend_on_its_batch(side):
    images, keys = noise(8, 3, side, side), KEYS[:8]
    together = apply(BYOL, images, keys, "v")
    alone = [apply(BYOL, images[i : i + 1], keys[i : i + 1], "v") for i in range(8)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, apply(BYOL, images, keys, "w"))


def test_nothing_drawn_changes_nothing():
    images = noise(4, 3, 8, 8)
    for still in (Photometry(), BYOL.model_copy(update={"jitter_p": 0, "gray_p": 0, "blur_p": 0, "solarize_p": 0})):
        assert torch.equal(apply(still, images, KEYS[:4], "v"), images / 255)


def test_the_input_stays_and_the_output_is_in_range():
    for images in (noise(16, 3, 8, 8), noise(16, 3, 8, 8) / 255):
        before = images.clone()
        changed = apply(BYOL, images, KEYS[:16], "v")
        assert torch.equal(images, before) and changed.dtype == torch.float32
        assert changed.min() >= 0 and changed.max() <= 1


def test_keys_may_stay_on_the_cpu():
    elsewhere = noise(16, 3, 8, 8).to("meta")  # refuses to meet a tensor of the CPU, as a GPU does
    assert apply(BYOL, elsewhere, KEYS[:16], "v").device.type == "meta"


def test_bytes_and_floats_are_the_same_image():
    images = noise(8, 3, 8, 8)
    assert torch.equal(apply(BYOL, images, KEYS[:8], "v"), apply(BYOL, images / 255, KEYS[:8], "v"))


@pytest.mark.parametrize(
    "wrong", [{"blur_sigma": (0.0, 1.0)}, {"blur_sigma": (2.0, 1.0)}, {"blur_kernel": 4}, {"hue": 0.6}, {"grey_p": 1}]
)
def test_refuses(wrong):
    with pytest.raises(ValidationError):
        Photometry(**wrong)
