"""Zen-Score (Lin et al. 2021, arXiv 2102.01063): how much a network without training can express, from noise alone.

The network is a plain chain: no shortcuts, BatchNorm in train mode, all weights from N(0, 1). Images of noise x and
x + g e go through it, and

    Zen = log( mean over images of sum |f(x) - f(x + g e)| ) + sum over BatchNorms of log sqrt( mean variance )

with f the maps before pooling. The second term gives back the scale that BatchNorm takes out; without it depth would
not count. As in the released code the distance is the sum of absolute values (the paper writes a Frobenius norm), and
the variances are the running ones of torch after both forwards, .81 + .09 v(x) + .1 v(x + g e), which dampens them;
`exact` takes v(x + g e) itself.

Networks are built on the meta device and filled in place, and images lie channels-last, for which BatchNorm takes a
third of the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from workloads.models.structure import Structure
from workloads.models.zennet import EPS


class Zen(NamedTuple):
    score: float
    delta: float  # the distance
    scale: float  # the sum over BatchNorms


class Plain(nn.Module):
    """The convolutions and BatchNorms of a structure in a row; a ReLU behind each, also where shortcuts would end."""

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        convs = [conv for part in structure for branch in part.branches() for conv in branch.convs]
        self.convs = nn.ModuleList(
            nn.Conv2d(c.width_in, c.width, c.kernel, c.stride, c.kernel // 2, groups=c.groups, bias=False)
            for c in convs
        )
        self.norms = nn.ModuleList(nn.BatchNorm2d(c.width, eps=EPS, affine=False) for c in convs)

    def forward(self, x: Tensor) -> Tensor:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = norm(conv(x)).relu_()
        return x


@torch.inference_mode()
def zen_score(
    structure: Structure,
    *,
    size: int,
    batch_size: int = 64,
    g: float = 0.01,
    classes: int | None = None,
    exact: bool = False,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Zen:
    """One repeat: fresh weights, fresh noise.

    Args:
        structure: of the network.
        size: side of the images.
        batch_size: of the noise.
        g: how far the second images are from the first.
        classes: of a classifier whose weights are drawn too, before the noise, as the released code does; None: none.
        exact: variances of the second batch rather than the running ones.
        generator: of weights and noise, on `device`; None: torch's own.
        device: where it is computed.
    """
    with torch.device("meta"):
        plain = Plain(structure)
    plain.to_empty(device=device)
    for conv in plain.convs:
        conv.weight.normal_(generator=generator)  # type: ignore[operator]
    plain.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # drawn before: numbers go by memory
    for norm in plain.norms:
        assert isinstance(norm, nn.BatchNorm2d)
        norm.reset_running_stats()
        if exact:
            norm.momentum = 1.0
    if classes is not None:
        torch.empty(classes, structure[-1].width, device=device).normal_(generator=generator)
    shape = (batch_size, structure[0].width_in, size, size)
    x, e = (torch.empty(shape, device=device).normal_(generator=generator) for _ in range(2))
    near = [images.contiguous(memory_format=torch.channels_last) for images in (x, x + g * e)]
    delta = float((plain(near[0]) - plain(near[1])).abs().sum(dim=(1, 2, 3)).mean())
    variances = torch.stack([norm.running_var.mean() for norm in plain.norms])  # type: ignore[operator]
    scale = float(variances.double().log().sum() / 2)
    return Zen(math.log(delta) + scale, delta, scale)
