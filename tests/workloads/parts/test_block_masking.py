"""Block-wise masks against the cards of MaskFeat (arXiv 2112.09133) and MaskDistill (arXiv 2210.10615)."""

from __future__ import annotations

import math
from random import Random
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.data.keys import sample_keys
from workloads.parts.block_masking import block_masking

KEYS = sample_keys(0, 0, torch.arange(500))
IMAGE: dict[str, Any] = {"window": (1, 14, 14), "n": 78, "min_area": 15, "salt": "test"}
CLIP: dict[str, Any] = {"window": (8, 7, 7), "n": 157, "min_area": 9, "max_area": 49, "tries": 100, "salt": "test"}


def opened(mask: Tensor, side: int) -> Tensor:
    """The cells of bool [B, T, H, W] that lie in a hidden square: eroded, then dilated."""
    visible = F.max_pool2d((~mask).float(), side, stride=1)
    return F.max_pool2d(F.pad(1 - visible, [side - 1] * 4), side, stride=1).bool()


def plain(
    random: Random, window: tuple[int, int, int], n: int, min_area: int, max_area: int | None = None, tries: int = 10
) -> Tensor:
    """The same algorithm one block at a time, as the papers tell it."""
    T, H, W = window
    mask = torch.zeros(window, dtype=torch.bool)
    failed = 0
    while (left := n - int(mask.sum())) > 0 and failed < tries:
        area = random.uniform(min_area, max_area or left)
        ratio = math.exp(random.uniform(math.log(0.3), -math.log(0.3)))
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        failed += 1
        if h < H and w < W:
            top, edge, length = random.randint(0, H - h), random.randint(0, W - w), random.randint(1, T)
            start = random.randint(0, T - length)
            block = mask[start : start + length, top : top + h, edge : edge + w]
            if 0 < block.numel() - block.sum() <= left:
                block[:] = True
                failed = 0
    return mask


@pytest.mark.parametrize("kind", [IMAGE, CLIP], ids=["image", "clip"])
def test_masks_are_spread_like_those_of_the_plain_loop(kind: dict[str, Any]) -> None:
    random = Random(0)
    arguments = {name: value for name, value in kind.items() if name != "salt"}
    expected = torch.stack([plain(random, **arguments) for _ in range(300)]).double()
    got = block_masking(KEYS, **kind).double()
    counts = [masks.sum(dim=(1, 2, 3)) for masks in (expected, got)]
    assert (counts[1].mean() - counts[0].mean()).abs() < 0.6
    assert (counts[1].std() - counts[0].std()).abs() < 0.6
    assert (got.mean(dim=0) - expected.mean(dim=0)).abs().max() < 0.15


@pytest.mark.parametrize("min_area", [15, 16])
def test_an_image_loses_almost_always_what_it_should(min_area: int) -> None:
    masks = block_masking(KEYS, **IMAGE | {"min_area": min_area})
    assert masks.shape == (500, 1, 14, 14) and masks.dtype == torch.bool
    count = masks.sum(dim=(1, 2, 3)).double()
    assert count.max() == 78
    assert count.mean() == pytest.approx(77.5, abs=0.2)
    assert (count == 78).double().mean() == pytest.approx(2 / 3, abs=0.07)


def test_a_clip_loses_no_more_than_it_should() -> None:
    count = block_masking(KEYS, **CLIP).sum(dim=(1, 2, 3)).double()
    assert count.max() == 157
    assert count.mean() > 155


@pytest.mark.parametrize("window", [(1, 14, 14), (8, 7, 7)])
def test_hidden_cells_lie_in_blocks(window: tuple[int, int, int]) -> None:
    """With one size of block only: each hidden cell lies in a hidden square of that size."""
    masks = block_masking(KEYS, window, 60, min_area=9, max_area=9, aspect=1, salt="test")
    assert masks.any()
    assert torch.equal(opened(masks, 3), masks)


def test_a_single_block_is_a_rectangle_of_the_wanted_area_and_aspect() -> None:
    """Once a block of 20 to 30 cells is there, no other fits into the 30: what comes second overlaps almost wholly."""
    masks = block_masking(KEYS, (1, 14, 14), 30, min_area=20, tries=1, salt="test")[:, 0]
    high, wide = masks.any(dim=2).sum(dim=1), masks.any(dim=1).sum(dim=1)
    boxes = masks[masks.sum(dim=(1, 2)) == high * wide]
    assert len(boxes) > 250
    ratio = (high / wide)[masks.any(dim=(1, 2))].log()
    assert ratio.min() < -0.8 and ratio.max() > 0.8
    assert abs(ratio.mean()) < 0.1


def test_a_cube_lasts_for_any_length_of_time() -> None:
    """A square of 6 x 6 in 7 x 7 lasts t frames; a second one at the same time does not fit into what is left."""
    masks = block_masking(KEYS, (8, 7, 7), 36 * 8, min_area=36, max_area=36, aspect=1, tries=1, salt="test")
    frames = masks.any(dim=(2, 3)).sum(dim=1)
    assert set(frames.tolist()) == set(range(1, 9))
    assert torch.equal(opened(masks, 6), masks)


def test_a_block_is_smaller_than_the_window() -> None:
    """In height and in width: where every block would fill it nothing is hidden, and the search ends."""
    assert not block_masking(KEYS, (1, 4, 4), 16, min_area=16, aspect=1, salt="test").any()


@pytest.mark.parametrize("kind", [IMAGE, CLIP])
def test_a_mask_belongs_to_the_sample(kind: dict[str, Any]) -> None:
    whole = block_masking(KEYS, **kind)
    parts = [block_masking(keys, **kind) for keys in KEYS.split(130)]
    assert torch.equal(whole, torch.cat(parts))
    assert not torch.equal(whole, block_masking(KEYS, **kind | {"salt": "another"}))
    next_epoch = block_masking(sample_keys(0, 1, torch.arange(500)), **kind)
    assert (whole != next_epoch).flatten(1).any(dim=1).double().mean() > 0.99
