import math

import pytest
import torch
from pydantic import ValidationError

from workloads.data.keys import sample_keys, uniform
from workloads.data.transforms.erasing import TRIES, Erasing, apply, draw

KEYS = sample_keys(0, 0, torch.arange(4000))
ALWAYS = Erasing(p=1.0)


def reference_box(height, width, u, erasing):
    """timm's RandomErasing._erase with one rectangle, reading its random numbers from `u`."""
    if u[0] >= erasing.p:
        return [0, 0, 0, 0]
    for share, aspect in zip(u[3 : 3 + TRIES], u[3 + TRIES :], strict=True):
        area = (erasing.area[0] + share * (erasing.area[1] - erasing.area[0])) * height * width
        low, high = (math.log(r) for r in erasing.ratio)
        ratio = math.exp(low + aspect * (high - low))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if w < width and h < height:
            return [int(u[1] * (height - h + 1)), int(u[2] * (width - w + 1)), h, w]
    return [0, 0, 0, 0]


@pytest.mark.parametrize("size", [(32, 32), (224, 160), (10, 90), (1, 1)])
@pytest.mark.parametrize("erasing", [Erasing(), ALWAYS, Erasing(p=0.7, area=(0.5, 1.0))])
def test_boxes_are_timms(size, erasing):
    draws = uniform(KEYS[:300], 3 + 2 * TRIES, "v/erasing").tolist()
    assert draw(erasing, KEYS[:300], size, "v").tolist() == [reference_box(*size, u, erasing) for u in draws]


def test_share_of_erased_samples_and_pixels():
    top, left, h, w = draw(Erasing(), KEYS, (224, 224), "v").T
    assert (h > 0).double().mean() == pytest.approx(0.25, abs=0.02)
    area = (h * w)[h > 0] / 224**2
    # Uniform, except that a large and long one that does not fit is drawn again.
    assert area.mean() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02) and 0.019 < area.min() < area.max() < 0.34
    assert (h / w)[h > 0].log().mean() == pytest.approx(0, abs=0.08)
    assert ((top + h) <= 224).all() and ((left + w) <= 224).all()


def test_only_the_box_becomes_normal_noise():
    images = torch.full((300, 3, 20, 16), 7.0)
    erased = apply(ALWAYS, images, KEYS[:300], "v")
    changed = erased != 7
    for (top, left, h, w), where in zip(draw(ALWAYS, KEYS[:300], (20, 16), "v").tolist(), changed, strict=True):
        box = torch.zeros(20, 16, dtype=torch.bool)
        box[top : top + h, left : left + w] = True
        assert torch.equal(where, box.expand(3, -1, -1))
    noise = erased[changed]
    assert noise.mean() == pytest.approx(0, abs=0.02) and noise.std() == pytest.approx(1, abs=0.02)
    assert (noise**4).mean() == pytest.approx(3, abs=0.15)
    assert len(noise.unique()) > 0.999 * len(noise)
    assert (images == 7).all()


def test_a_sample_does_not_depend_on_its_batch():
    images = uniform(KEYS[:8], 3 * 20 * 20, "images").float().reshape(8, 3, 20, 20)
    together = apply(ALWAYS, images, KEYS[:8], "v")
    alone = [apply(ALWAYS, images[i : i + 1], KEYS[i : i + 1], "v") for i in range(8)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, apply(ALWAYS, images, KEYS[:8], "w"))


def test_without_probability_nothing_changes():
    images = uniform(KEYS[:8], 48, "images").half().reshape(8, 3, 4, 4)
    same = apply(Erasing(p=0), images, KEYS[:8], "v")
    assert torch.equal(same, images) and same.dtype == torch.float16


def test_refuses():
    for wrong in ({"area": (0.5, 0.2)}, {"area": (0.0, 1.2)}, {"ratio": (0.0, 1.0)}, {"p": 2.0}):
        with pytest.raises(ValidationError):
            Erasing(**wrong)
    with pytest.raises(AssertionError, match="after normalisation"):
        apply(ALWAYS, torch.zeros(1, 3, 4, 4, dtype=torch.uint8), KEYS[:1], "v")
