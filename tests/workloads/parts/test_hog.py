"""HOG against the golden numbers of MaskFeat's card (arXiv 2112.09133), and its pictures."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from workloads.parts.hog import hog, hog_pictures, hog_tokens

Y, X = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")


def image(plane: Tensor) -> Tensor:
    return plane.expand(1, 3, -1, -1)


def noise(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("plane", "k"), [(X, 4), (Y, 0), (-X, 4), (-Y, 0)], ids=["x", "y", "-x", "-y"])
def test_a_ramp_is_in_one_bin_whatever_its_sign(plane: Tensor, k: int, dtype: torch.dtype) -> None:
    expected = torch.zeros(9, dtype=dtype)
    expected[k] = 1
    assert torch.equal(hog(image(plane.to(dtype))), expected[:, None, None].expand(1, 3, 9, 2, 2))


def test_where_nothing_changes_all_is_zero() -> None:
    assert not hog(image(torch.full((16, 16), 3.0))).any()


def test_golden() -> None:
    histograms = hog(image((3 * X + 5 * Y**2 + X * Y) % 17))[0, 0]  # [9, 2, 2]
    assert histograms[:, 0, 0].tolist() == pytest.approx(
        [0.3214, 0.070522, 0.408062, 0.39642, 0.485154, 0.214987, 0.442261, 0.195646, 0.229348], abs=2e-6
    )
    assert histograms[:, 1, 0].tolist() == pytest.approx(
        [0.618826, 0.08217, 0.306526, 0.263791, 0.328804, 0.20406, 0.40469, 0.213504, 0.296053], abs=2e-6
    )


@pytest.mark.parametrize("scale", [0.01, 3.7, -1.0, -2.2])
def test_brightness_and_contrast_do_not_matter(scale: float) -> None:
    images = noise(2, 3, 32, 32, dtype=torch.float64)
    assert (hog(scale * images + 0.7) - hog(images)).abs().max() < 1e-6


def test_each_cell_has_unit_length() -> None:
    images = noise(2, 3, 224, 224)
    images[:, :, :64, :64] = 1
    histograms = hog(images)
    assert histograms.shape == (2, 3, 9, 28, 28)
    length = histograms.norm(dim=2)
    assert not length[:, :, :7, :7].any()
    torch.testing.assert_close(length[:, :, 8:, 8:], torch.ones(2, 3, 20, 20))


def test_channels_are_apart() -> None:
    images = noise(1, 3, 16, 16)
    other = images.clone()
    other[:, 1] = noise(1, 16, 16) ** 2
    changed = (hog(images) != hog(other)).flatten(2).any(dim=2)
    assert changed.tolist() == [[False, True, False]]


def test_autocast_does_not_coarsen_it() -> None:
    images = noise(1, 3, 32, 32)
    with torch.autocast("cpu", torch.bfloat16):
        coarse = hog_tokens(images, 16)
    assert coarse.dtype == torch.float32
    assert torch.equal(coarse, hog_tokens(images, 16))


def test_tokens_are_ordered_by_channel_bin_row_and_column() -> None:
    images = noise(2, 3, 32, 48)
    tokens, histograms = hog_tokens(images, 16), hog(images)
    assert tokens.shape == (2, 6, 108)
    for token, (top, left) in ((1, (0, 2)), (5, (2, 4))):
        cells = histograms[:, :, :, top : top + 2, left : left + 2]  # [2, 3, 9, 2, 2]
        assert torch.equal(tokens[:, token], cells.flatten(1))


@pytest.mark.parametrize(("patch", "cell", "width"), [(16, 8, 108), (4, 4, 27), (16, 4, 432)])
def test_width_of_a_token(patch: int, cell: int, width: int) -> None:
    assert hog_tokens(noise(1, 3, 32, 32), patch, cell).shape == (1, (32 // patch) ** 2, width)


def test_pictures_show_edges_where_they_are() -> None:
    """A ramp to the right has upright edges: a line in the middle of each cell, half on each of two columns."""
    upright = hog_pictures(hog_tokens(image(X), 16), 16)
    assert upright.shape == (1, 3, 16, 16)
    column = torch.tensor([0, 0, 0, 0.5, 0.5, 0, 0, 0]).repeat(2)
    torch.testing.assert_close(upright, column.expand(1, 3, 16, 16))
    # bin 2 has gradients about 50 degrees from vertical, down to the right: its edges go up to the right
    slanted = hog_pictures(hog_tokens(image(1.19 * X + Y), 16), 16)[0, 0, :8, :8]
    assert slanted.flip(1).diagonal().sum() > 3 * slanted.diagonal().sum()


def test_pictures_of_anything_are_in_range() -> None:
    pictures = hog_pictures(3 * noise(2, 4, 108), 16)
    assert pictures.shape == (2, 3, 32, 32)
    assert pictures.min() == 0 and pictures.max() == 1
