from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from workloads.data.keys import uniform
from workloads.parts.slices import jitter, one_of_each_part, take_slices, window

IMAGES = torch.rand(3, 2, 12, 16, generator=torch.Generator().manual_seed(0))
CENTRE = torch.full((3, 2), 0.5)
ONE, ZERO = torch.ones(3), torch.zeros(3)


def test_each_part_has_equally_many_slices_and_the_rest_belongs_to_none() -> None:
    """11 slices from the third on, in 4 parts: two each, the last three are never drawn."""
    u = uniform(torch.arange(400), 4, "")
    index = one_of_each_part(torch.full((400,), 3), torch.full((400,), 11), u)
    assert [sorted(set(column)) for column in index.T.tolist()] == [[3, 4], [5, 6], [7, 8], [9, 10]]
    assert (index - index.min(dim=0).values).float().mean(dim=0).sub(0.5).abs().max() < 0.1


def test_volumes_of_several_depths_and_of_too_few_slices() -> None:
    index = one_of_each_part(torch.tensor([0, 2, 5]), torch.tensor([8, 2, 1]), torch.full((3, 4), 0.99))
    assert index.tolist() == [[1, 3, 5, 7], [2, 3, 3, 3], [5, 5, 5, 5]]


def test_slices_are_taken_along_the_depth() -> None:
    volumes = torch.rand(2, 3, 5, 4, 6)
    index = torch.tensor([[0, 4], [2, 2]])
    taken = take_slices(volumes, index)
    assert taken.shape == (2, 2, 3, 4, 6)
    assert all(torch.equal(taken[b, s], volumes[b, :, index[b, s]]) for b in (0, 1) for s in (0, 1))


def test_the_whole_window_is_the_image() -> None:
    assert torch.allclose(window(IMAGES, CENTRE, ONE, ZERO), IMAGES, atol=1e-5)


def test_a_window_is_a_crop_made_as_large_as_the_image() -> None:
    """But at its edge, where pixels outside of it are still at hand."""
    centre = torch.tensor([[3 + 3, 4 + 4]] * 3) / torch.tensor([12, 16])
    seen = window(IMAGES, centre, ONE / 2, ZERO)
    cut = F.interpolate(IMAGES[:, :, 3:9, 4:12], scale_factor=2.0, mode="bilinear", align_corners=False)
    assert torch.allclose(seen[:, :, 1:-1, 1:-1], cut[:, :, 1:-1, 1:-1], atol=1e-5)


def test_each_image_has_its_own_window_and_outside_is_nothing() -> None:
    centre = torch.tensor([[0.5, 0.5], [0.0, 0.5], [2.0, 2.0]])
    seen = window(IMAGES, centre, ONE, ZERO)
    assert torch.allclose(seen[0], IMAGES[0], atol=1e-5)
    assert torch.allclose(seen[1, :, 6:], IMAGES[1, :, :6], atol=1e-5) and seen[1, :, :6].max() < 1e-5
    assert not seen[2].any()
    assert torch.equal(window(IMAGES[1:2], centre[1:2], ONE[:1], ZERO[:1]), seen[1:2])


def test_a_quarter_turn_turns_pixels_not_shares() -> None:
    square = IMAGES[:, :, :, 2:14]
    quarter = window(square, CENTRE, ONE, ONE * math.pi / 2)
    assert torch.allclose(quarter, torch.rot90(square, 1, (2, 3)), atol=1e-4) or torch.allclose(
        quarter, torch.rot90(square, -1, (2, 3)), atol=1e-4
    )
    wide = window(IMAGES, CENTRE, ONE, ONE * math.pi / 2)
    assert torch.allclose(wide[:, :, :, 2:14], quarter, atol=1e-4) and not wide[:, :, :, :1].any()


def test_classes_follow_their_pixels() -> None:
    """A bright disc and its label, turned, scaled and shifted, stay on each other; numbers are not mixed."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    disc = ((y - 12) ** 2 + (x - 18) ** 2 < 49).float().expand(3, 1, 32, 32)
    centre, scale, turn = torch.tensor([[0.45, 0.5], [0.5, 0.6], [0.55, 0.5]]), ONE * 0.9, ONE * 0.3
    image, label = window(disc, centre, scale, turn), window(3 * disc, centre, scale, turn, nearest=True)
    assert set(label.unique().tolist()) == {0, 3}
    assert torch.equal(image > 0.9, (image > 0.9) & (label == 3)) and (label == 3).sum() > 300


def test_intensities() -> None:
    seen = jitter(IMAGES, torch.tensor([0.2, 0.0, 5.0]), torch.tensor([1.0, 0.5, 1.0]))
    assert torch.allclose(seen[0], (IMAGES[0] + 0.2).clamp(max=1.5))
    mean = IMAGES[1].mean()
    assert torch.allclose(seen[1], mean + (IMAGES[1] - mean) / 2) and seen[2].eq(1.5).all()
    assert jitter(IMAGES, -ONE, ONE).eq(0).all()
