"""The convolution of our networks: only its stride changes the size of maps, and a BatchNorm has its bias."""

from __future__ import annotations

from torch import nn


def conv(width_in: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """[B, width_in, H, W] -> [B, width, H / stride, W / stride], for an odd kernel."""
    return nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)


def conv_norm(
    width_in: int, width: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, eps: float = 1e-5
) -> nn.Sequential:
    """The same and its BatchNorm; a network initialises both."""
    return nn.Sequential(conv(width_in, width, kernel, stride, groups), nn.BatchNorm2d(width, eps=eps))
