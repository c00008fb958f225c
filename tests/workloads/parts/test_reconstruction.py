"""Pixels as a target, the loss over hidden patches, and what pictures show."""

from __future__ import annotations

import pytest
import torch

from workloads.parts.patches import normalise_patches, patchify
from workloads.parts.reconstruction import filled_in, hide, masked_mean, masked_mse, pixel_target

P = 4
IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
MASK = torch.tensor([[1.0, 0, 1, 1], [0, 1, 0, 0]])  # 3 and 1 of 4 patches


def test_targets() -> None:
    patches = patchify(IMAGES, P)
    assert torch.equal(pixel_target(IMAGES, P, norm_pix=False), patches)
    normalised = pixel_target(IMAGES, P, norm_pix=True)
    assert torch.equal(normalised, normalise_patches(patches))
    assert normalised.mean(-1).abs().max() < 1e-6 and (normalised.var(-1) - 1).abs().max() < 1e-4


def test_the_mean_is_over_the_hidden_patches_of_the_batch() -> None:
    """Each patch counts once, whatever the image that it is of."""
    error = torch.randn(2, 4, 5, generator=torch.Generator().manual_seed(1))
    hidden = error[MASK == 1]  # [4, 5]
    assert masked_mean(error, MASK).item() == pytest.approx(hidden.mean().item(), abs=1e-6)
    assert masked_mean(torch.where(MASK[:, :, None] == 1, error, 1e6), MASK).item() == masked_mean(error, MASK).item()


def test_the_error_is_taken_in_float32() -> None:
    target = torch.full((1, 2, 3), 1000.0)
    pred = torch.full((1, 2, 3), 1000.0, dtype=torch.bfloat16)
    loss = masked_mse(pred, target + 0.5, torch.ones(1, 2))
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(0.25)


def test_no_gradient_goes_into_kept_patches() -> None:
    pred = torch.zeros(2, 4, 48, requires_grad=True)
    masked_mse(pred, pixel_target(IMAGES, P, norm_pix=True), MASK).backward()
    assert pred.grad is not None and not pred.grad[MASK == 0].any() and pred.grad[MASK == 1].any(dim=-1).all()


def test_hidden_patches_are_grey() -> None:
    patches, shown = patchify(IMAGES, P), patchify(hide(IMAGES, MASK, P), P)
    assert not shown[MASK == 1].any()
    assert torch.equal(shown[MASK == 0], patches[MASK == 0])


@pytest.mark.parametrize("norm_pix", [False, True])
def test_a_perfect_prediction_gives_the_image_back(norm_pix: bool) -> None:
    pred = pixel_target(IMAGES, P, norm_pix=norm_pix)
    assert torch.allclose(filled_in(IMAGES, pred, MASK, P, norm_pix=norm_pix), IMAGES, atol=1e-5)


def test_a_prediction_shows_in_hidden_patches_only() -> None:
    filled = patchify(filled_in(IMAGES, torch.full((2, 4, 48), 9.0), MASK, P, norm_pix=False), P)
    assert (filled[MASK == 1] == 9).all()
    assert torch.equal(filled[MASK == 0], patchify(IMAGES, P)[MASK == 0])
