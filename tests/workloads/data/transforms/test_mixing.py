import numpy as np
import pytest
import torch
from pydantic import ValidationError

import workloads.models.timm_import  # noqa: F401 (timm may need it)
from workloads.data.keys import sample_keys, uniform
from workloads.data.transforms.mixing import Mixing, apply, beta, draw

from timm.data import mixup as timm  # isort: skip (after the fallback)

KEYS = sample_keys(0, 0, torch.arange(4000))
SIZE = (24, 32)
ELEM = Mixing(mode="elem")
ONLY_MIXUP, ONLY_CUTMIX = Mixing(mode="elem", cutmix_alpha=0), Mixing(mode="elem", mixup_alpha=0)


def batch(count: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    keys = KEYS[:count]
    return uniform(keys, 3 * 24 * 32, "images").float().reshape(count, 3, *SIZE), torch.arange(count) * 7 % 10, keys


@pytest.mark.parametrize("alpha", [0.05, 0.4, 0.8, 1.0, 3.0])
def test_beta_has_its_distribution(alpha):
    values, reversed_ = beta(alpha, KEYS, "v"), beta(alpha, KEYS, "w")
    variance = 1 / (4 * (2 * alpha + 1))
    fourth = 3 * variance**2 * (2 * alpha + 1) / (2 * alpha + 3)
    assert values.isfinite().all() and values.min() >= 0 and values.max() <= 1
    assert values.mean() == pytest.approx(0.5, abs=4 * (variance / 4000) ** 0.5)
    assert values.var() == pytest.approx(variance, abs=4 * (fourth / 4000) ** 0.5)
    assert ((values - 0.5) ** 4).mean() == pytest.approx(fourth, rel=0.08)
    assert abs(torch.corrcoef(torch.stack([values, reversed_]))[0, 1]) < 0.06


def test_uniform_is_a_beta():
    values = beta(1.0, KEYS, "v").sort().values
    assert (values - (torch.arange(4000) + 0.5) / 4000).abs().max() < 1.63 / 4000**0.5  # Kolmogorov-Smirnov, 1 %


@pytest.mark.parametrize("mode", ["elem", "batch"])
def test_images_and_targets_are_timms_for_the_drawn_numbers(mode):
    mixing = Mixing(mode=mode)
    images, labels, keys = batch(8)
    kinds = set()
    for salt in "abcdef":
        own, box = draw(mixing, keys, SIZE, salt)
        kinds |= set((box[:, 2] > 0).tolist())
        mixed, targets = apply(mixing, images, labels, 10, keys, salt)
        reference = images.clone()
        for i, (left, top, right, bottom) in enumerate(box.tolist()):
            partner = images[7 - i]
            if right:
                reference[i, :, top:bottom, left:right] = partner[:, top:bottom, left:right]
            else:
                reference[i] = images[i] * own[i] + partner * (1 - own[i])
        torch.testing.assert_close(mixed, reference)
        expected = timm.mixup_target(labels, 10, own.float()[:, None], smoothing=0.1)
        torch.testing.assert_close(targets, expected)
    assert kinds == {False, True}


def test_boxes_are_timms(monkeypatch):
    own, box = draw(ONLY_CUTMIX, KEYS[:200], SIZE, "v")
    share = beta(1.0, KEYS[:200], "v/cutmix").tolist()
    u = uniform(KEYS[:200], 4, "v/mixing").tolist()
    for i in range(200):
        centres = iter([int(u[i][3] * 24), int(u[i][2] * 32)])  # timm draws y first
        monkeypatch.setattr(np.random, "randint", lambda *_, c=centres, **__: next(c))
        (top, bottom, left, right), corrected = timm.cutmix_bbox_and_lam((3, *SIZE), share[i])
        assert box[i].tolist() == [left, top, right, bottom] and own[i] == pytest.approx(corrected)


def test_shares_of_what_is_applied():
    own, box = draw(Mixing(mode="elem", p=0.6, switch_p=0.25), KEYS, SIZE, "v")
    cut = box[:, 2] > 0
    assert (own < 1).double().mean() == pytest.approx(0.6, abs=0.03)
    assert (cut & (own < 1)).double().mean() == pytest.approx(0.15, abs=0.03)
    assert not (draw(ONLY_MIXUP, KEYS, SIZE, "v")[1] > 0).any()
    assert (draw(ONLY_CUTMIX, KEYS, SIZE, "v")[0] < 1).double().mean() > 0.95


def test_own_share_is_what_remains_of_the_pixels():
    _, labels, keys = batch(64)
    ours = torch.zeros(64, 1, *SIZE)
    ours[::2] = 1  # of each pair, one is white: 63 - i has the other parity
    mixed, _ = apply(ELEM, ours, labels, 10, keys, "v")
    own, _ = draw(ELEM, keys, SIZE, "v")
    white = mixed.mean(dim=(1, 2, 3))
    torch.testing.assert_close(torch.where(torch.arange(64) % 2 == 0, white, 1 - white), own.float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("mode", ["elem", "batch"])
@pytest.mark.parametrize("count", [1, 7, 8])
def test_targets_sum_to_one(mode, count):
    images, labels, keys = batch(count)
    mixed, targets = apply(Mixing(mode=mode), images, labels, 10, keys, "v")
    torch.testing.assert_close(targets.sum(dim=1), torch.ones(count))
    assert targets.min() >= 0.01 - 1e-7 and mixed.shape == images.shape
    if count % 2:  # the middle one is its own partner
        torch.testing.assert_close(mixed[count // 2], images[count // 2])


def test_elem_mode_depends_on_the_batch_by_the_partner_only():
    images, labels, keys = batch(8)
    mixed, targets = apply(ELEM, images, labels, 10, keys, "v")
    for i in range(8):
        pair = torch.tensor([i, 7 - i])
        alone, target = apply(ELEM, images[pair], labels[pair], 10, keys[pair], "v")
        assert torch.equal(alone[0], mixed[i]) and torch.equal(target[0], targets[i])


def test_keys_may_stay_on_the_cpu():
    images, labels, keys = batch(8)  # "meta" refuses to meet a tensor of the CPU, as a GPU does
    mixed, targets = apply(ELEM, images.to("meta"), labels.to("meta"), 10, keys, "v")
    assert mixed.device.type == targets.device.type == "meta"


def test_batch_mode_draws_once():
    own, box = draw(Mixing(), KEYS[:9], SIZE, "v")
    assert len(own.unique()) == 1 and len(box.unique(dim=0)) == 1
    assert torch.equal(own[:1], draw(ELEM, KEYS[:1], SIZE, "v")[0])


def test_without_probability_only_labels_are_smoothed():
    images, labels, keys = batch(6)
    for still in (Mixing(p=0), Mixing(mixup_alpha=0, cutmix_alpha=0)):
        mixed, targets = apply(still, images, labels, 10, keys, "v")
        assert torch.equal(mixed, images)
        assert torch.equal(targets.argmax(dim=1), labels) and targets.max() == pytest.approx(0.91)


def test_video_keeps_its_box_in_every_frame():
    images, labels, keys = batch(8)
    clips = images[:, :, None].expand(-1, -1, 5, -1, -1)
    mixed, _ = apply(ELEM, clips, labels, 10, keys, "v")
    assert torch.equal(mixed[:, :, 3], apply(ELEM, images, labels, 10, keys, "v")[0])


def test_refuses():
    with pytest.raises(ValidationError):
        Mixing(mode="pair")
    images, labels, keys = batch(2)
    with pytest.raises(AssertionError, match="uint8"):
        apply(ELEM, images.byte(), labels, 10, keys, "v")
