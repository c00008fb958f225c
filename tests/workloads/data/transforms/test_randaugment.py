import random

import numpy as np
import pytest
import torch
from PIL import Image

import workloads.models.timm_import  # noqa: F401 (timm may need it)
from workloads.data.keys import sample_keys, uniform
from workloads.data.transforms import randaugment as ra
from workloads.data.transforms.randaugment import OPERATIONS, RandAugment, apply, draw

from timm.data import auto_augment as timm  # isort: skip (after the fallback)

KEYS = sample_keys(0, 0, torch.arange(6000))
MAE = RandAugment.parse("rand-m9-mstd0.5-inc1")
PLAIN = ["AutoContrast", "Equalize", "Invert", "Rotate", "Posterize", "Solarize", "SolarizeAdd", "Color"]
PLAIN += ["Contrast", "Brightness", "Sharpness", "ShearX", "ShearY", "TranslateX", "TranslateY"]
GROWS = {"Posterize", "Solarize", "Color", "Contrast", "Brightness", "Sharpness"}
SIGNED = {"Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY"}


def timm_name(name: str, increasing: bool) -> str:
    return name + ("Increasing" if increasing and name in GROWS else "") + ("Rel" if "Translate" in name else "")


def smooth(count: int, height: int = 40, width: int = 48) -> torch.Tensor:
    """Waves, some channels of one value, and a narrow range, so that stretching does something."""
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    frequency = uniform(torch.arange(count), 3, "f")[:, :, None, None] / 4
    waves = 120 + 90 * torch.sin(frequency * x + frequency.flip(1) * y)
    waves[0, 0] = 77
    return waves.byte()


def noise(count: int, side: int = 17) -> torch.Tensor:
    return (uniform(torch.arange(count), 3 * side * side, "noise") * 256).reshape(count, 3, side, side).byte()


def by_pillow(image: torch.Tensor, name: str, argument: float | None, **options: object) -> torch.Tensor:
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    given = () if argument is None else (argument,)
    changed = timm.NAME_TO_OP[name](picture, *given, fillcolor=(124, 116, 104), **options)
    return torch.from_numpy(np.array(changed)).permute(2, 0, 1)


ARGUMENTS = {
    "Posterize": [1, 2, 3, 4],
    "Solarize": [0, 26, 200, 256],
    "SolarizeAdd": [0, 11, 99, 110],
    **{name: [0.1, 0.73, 1.0, 1.9] for name in ("Color", "Contrast", "Brightness", "Sharpness")},
    "Rotate": [-30.0, -3.3, 0.0, 27.0],
    **{name: [-0.3, -0.07, 0.0, 0.21] for name in ("ShearX", "ShearY")},
    **{name: [-0.45, -0.1, 0.0, 0.33] for name in ("TranslateX", "TranslateY")},
}


@pytest.mark.parametrize("name", [name for name in PLAIN if name not in SIGNED])
def test_operations_on_colour_are_pillows_to_the_bit(name):
    for images in (smooth(4), noise(4), noise(4, 2)):
        arguments = ARGUMENTS.get(name, [None] * 4)
        drawn = torch.tensor([argument or 0 for argument in arguments], dtype=torch.float64)
        ours = ra._operate(MAE, images, torch.full((4,), OPERATIONS.index(name)), drawn)
        expected = [by_pillow(i, name, a, resample=0) for i, a in zip(images, arguments, strict=True)]
        assert torch.equal(ours, torch.stack(expected))


@pytest.mark.parametrize("name", sorted(SIGNED))
@pytest.mark.parametrize(("interpolation", "filter", "near"), [("bilinear", 2, 1), ("bicubic", 3, 3)])
def test_geometry_is_pillows(name, interpolation, filter, near):
    images, arguments = smooth(4), ARGUMENTS[name]
    policy = MAE.model_copy(update={"interpolation": interpolation})
    ours = ra._operate(policy, images, torch.full((4,), OPERATIONS.index(name)), torch.tensor(arguments).double())
    expected = torch.stack(
        [by_pillow(i, timm_name(name, False), a, resample=filter) for i, a in zip(images, arguments, strict=True)]
    )
    off = (ours.int() - expected.int()).abs()
    assert (off > near).float().mean() < 2e-3  # at the edge of what is filled, rounding decides about a pixel


def test_posterizing_to_no_bits_is_black():
    black = ra._operate(MAE, noise(1), torch.tensor([OPERATIONS.index("Posterize")]), torch.zeros(1).double())
    assert not black.any()  # as Pillow had it until it refused; timm asks for it at magnitude 10


@pytest.mark.parametrize("increasing", [False, True])
def test_arguments_are_timms(increasing, monkeypatch):
    for level in (0.0, 2.6, 5.0, 9.0, 9.99, 10.0):
        share = torch.tensor([level / 10], dtype=torch.float64)
        for sign, drawn in ((1, 0.2), (-1, 0.8)):
            monkeypatch.setattr(random, "random", lambda drawn=drawn: drawn)
            ours = dict(zip(OPERATIONS, ra._arguments(share, sign * share, increasing)[:, 0].tolist(), strict=True))
            for name in PLAIN:
                to_argument = timm.LEVEL_TO_ARG[timm_name(name, increasing)]
                assert ours[name] == pytest.approx(to_argument(level, {})[0] if to_argument else 0)


def test_policies_have_timms_operations():
    for increasing, theirs in ((False, timm._RAND_TRANSFORMS), (True, timm._RAND_INCREASING_TRANSFORMS)):
        assert sorted(timm_name(name, increasing) for name in OPERATIONS) == sorted(theirs)


def test_draws_have_timms_distribution():
    layers = draw(MAE, KEYS, "v")
    assert len(layers) == 2
    for layer in layers:
        assert layer.applied.double().mean() == pytest.approx(0.5, abs=0.02)
        counts = torch.bincount(layer.operation, minlength=15)
        assert (counts - 400).abs().max() < 4 * 400**0.5
        for name, per_level in (("Rotate", 3.0), ("ShearX", 0.03), ("TranslateY", 0.045)):
            argument = layer.argument[layer.operation == OPERATIONS.index(name)]
            level = argument.abs() / per_level
            assert (argument > 0).double().mean() == pytest.approx(0.5, abs=0.08)
            assert level.mean() == pytest.approx(9.0, abs=0.1)  # cut at 10: two deviations away
            assert level.std() == pytest.approx(0.5, abs=0.06) and level.max() <= 10
    pairs = torch.bincount(layers[0].operation * 15 + layers[1].operation, minlength=225)
    assert ((pairs - 6000 / 225) ** 2 / (6000 / 225)).sum() < 224 + 5 * (2 * 224) ** 0.5  # chi-squared
    fixed = draw(RandAugment(magnitude=7), KEYS, "v")[0]
    assert set(fixed.argument[fixed.operation == OPERATIONS.index("Rotate")].tolist()) == {-21.0, 21.0}


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_a_sample_does_not_depend_on_its_batch(interpolation):
    images, keys = smooth(20), KEYS[:20]
    policy = MAE.model_copy(update={"interpolation": interpolation, "p": 1.0})
    together, before = apply(policy, images, keys, "v"), images.clone()
    alone = [apply(policy, images[i : i + 1], keys[i : i + 1], "v") for i in range(20)]
    assert torch.equal(together, torch.cat(alone)) and torch.equal(images, before)
    assert not torch.equal(together, apply(policy, images, keys, "w"))


def test_a_sample_goes_through_its_layers_in_order():
    images, keys = smooth(16), KEYS[:16]
    policy = MAE.model_copy(update={"layers": 3, "p": 0.7})
    expected = images.clone()
    for layer in draw(policy, keys, "v"):
        for i in layer.applied.nonzero()[:, 0].tolist():
            chosen = slice(i, i + 1)
            expected[chosen] = ra._operate(policy, expected[chosen], layer.operation[chosen], layer.argument[chosen])
    assert torch.equal(apply(policy, images, keys, "v"), expected)


def test_without_layers_or_probability_nothing_changes():
    images = smooth(8)
    for still in (RandAugment(layers=0), RandAugment(p=0)):
        assert torch.equal(apply(still, images, KEYS[:8], "v"), images)


def test_keys_may_stay_on_the_cpu():
    elsewhere = smooth(64).to("meta")  # refuses to meet a tensor of the CPU, as a GPU does
    assert apply(MAE, elsewhere, KEYS[:64], "v").device.type == "meta"


def test_reads_timms_notation():
    assert RandAugment(magnitude=9, magnitude_std=0.5, increasing=True) == MAE
    assert RandAugment.parse("rand-m7-n3-p0.8-inc0") == RandAugment(magnitude=7, layers=3, p=0.8)
    assert RandAugment.parse("rand") == RandAugment()


@pytest.mark.parametrize("name", ["augmix-m3", "rand-x3", "rand-m11", "rand-m9-mstd101", "rand-m", "rand-tweights"])
def test_refuses(name):
    with pytest.raises(ValueError, match="RandAugment"):
        RandAugment.parse(name)
