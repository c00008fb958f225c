"""Crops of one size are one batch, and come back in their order."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from workloads.parts.multi_crop import multi_crop


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
