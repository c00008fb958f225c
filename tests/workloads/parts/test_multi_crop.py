"""Crops of one size are one batch, and come back in their order; views of two sizes for networks that see both."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workloads.data.views import View
from workloads.models.vit import ViTConfig
from workloads.parts.multi_crop import (
    GLOBAL_VIEW,
    LOCAL_VIEW,
    OTHER_VIEW,
    crop_views,
    crops_of,
    expect_local_crops,
    multi_crop,
)


class Recorder(nn.Module):
    """The mean of each image; remembers the shapes of its batches."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, ...]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(tuple(images.shape))
        return images.mean(dim=(2, 3))


def test_one_forward_for_each_size_whatever_the_order_and_the_number() -> None:
    torch.manual_seed(0)
    sizes = [(4, 8, 8), (4, 4, 4), (3, 8, 8), (4, 8, 4), (2, 4, 4)]
    crops = [torch.randn(n, 3, height, width) for n, height, width in sizes]
    encoder = Recorder()
    features = multi_crop(encoder, crops)
    assert encoder.seen == [(7, 3, 8, 8), (6, 3, 4, 4), (4, 3, 8, 4)]
    assert all(torch.equal(f, crop.mean(dim=(2, 3))) for f, crop in zip(features, crops, strict=True))


def test_gradients_flow_into_every_crop() -> None:
    crops = [torch.randn(2, 3, size, size, requires_grad=True) for size in (8, 4, 8)]
    sum(f.sum() for f in multi_crop(Recorder(), crops)).backward()
    assert all(torch.allclose(crop.grad, torch.tensor(1 / crop.shape[-1] ** 2)) for crop in crops)


def test_views_are_read_back_in_their_order() -> None:
    views = crop_views((256, 128), (GLOBAL_VIEW, OTHER_VIEW), (128, 64), LOCAL_VIEW, 3)
    assert list(views) == ["image", "other", "local0", "local1", "local2"]
    assert views["image"] == View(size=(256, 128), **GLOBAL_VIEW.model_dump())
    assert views["other"] == View(size=(256, 128), **OTHER_VIEW.model_dump())
    assert views["local2"] == View(size=(128, 64), **LOCAL_VIEW.model_dump())
    batch = {name: torch.full((1,), i) for i, name in enumerate(reversed(list(views)))}
    assert [int(x) for x in crops_of(batch, 3)] == [4, 3, 2, 1, 0]
    assert [int(x) for x in crops_of(batch, 0)] == [4, 3]


@pytest.mark.parametrize(("size", "use"), [(10, "use 8"), ((8, 10), r"use \[8, 8\]"), ((2, 8), r"use \[4, 8\]")])
def test_local_crops_that_patches_do_not_fill_are_refused(size: int | tuple[int, int], use: str) -> None:
    vit = ViTConfig(image_size=16, patch_size=4, dim=16, depth=1, heads=2).build()
    for fits in (8, (8, 4)):
        expect_local_crops(vit, fits)
    with pytest.raises(ValueError, match=f"for patches of 4, expected a multiple; {use}"):
        expect_local_crops(vit, size)
