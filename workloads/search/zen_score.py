"""Zen-Score (Lin et al. 2021, arXiv 2102.01063): how much a network without training can express, from noise alone.

The network is a plain chain: no shortcuts, BatchNorm in train mode, all weights from N(0, 1). Images of noise x and
x + g e go through it, and

    Zen = log( mean over images of sum |f(x) - f(x + g e)| ) + sum over BatchNorms of log sqrt( mean variance )

with f the maps before pooling. The second term gives back the scale that BatchNorm takes out; without it depth would
not count. As in the released code the distance is the sum of absolute values (the paper writes a Frobenius norm), and
the variances are the running ones of torch after both forwards, .81 + .09 v(x) + .1 v(x + g e), which dampens them.

There are no modules, whose making took as long as the scoring of a small network, and all lies channels-last,
for which BatchNorm takes a third of the time.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from workloads.models.structure import EPS, Structure


class Zen(NamedTuple):
    score: float
    delta: float  # the distance
    scale: float  # the sum over BatchNorms


@torch.inference_mode()
def zen_score(
    structure: Structure,
    *,
    size: int,
    batch_size: int = 64,
    g: float = 0.01,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Zen:
    """One repeat: fresh weights, fresh noise.

    Args:
        structure: of the network.
        size: side of the images.
        batch_size: of the noise.
        g: how far the second images are from the first.
        generator: of weights and noise, on `device`; None: torch's own.
        device: where it is computed.
    """
    convs = [conv for part in structure for branch in part.branches() for conv in branch.convs]
    shapes = [(c.width, c.width_in // c.groups, c.kernel, c.kernel) for c in convs]
    weights = [_normal(shape, generator, device) for shape in shapes]
    shape = (batch_size, structure[0].width_in, size, size)
    x, e = (_normal(shape, generator, device) for _ in range(2))
    means = [torch.zeros(c.width, device=device) for c in convs]
    variances = [torch.ones(c.width, device=device) for c in convs]  # running ones, changed by `features`

    def features(x: Tensor) -> Tensor:
        """A ReLU behind each convolution, also where shortcuts would end."""
        for c, weight, mean, variance in zip(convs, weights, means, variances, strict=True):
            x = functional.conv2d(x, weight, None, c.stride, c.kernel // 2, groups=c.groups)
            x = functional.batch_norm(x, mean, variance, None, None, True, 0.1, EPS).relu_()
        return x

    delta = float((features(x) - features(x + g * e)).abs().sum(dim=(1, 2, 3)).mean())
    scale = float(torch.stack([variance.mean() for variance in variances]).double().log().sum() / 2)
    return Zen(math.log(delta) + scale, delta, scale)


def _normal(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device | str) -> Tensor:
    """From N(0, 1); maps and weights of convolutions channels-last, though numbers are drawn in the usual order."""
    drawn = torch.empty(shape, device=device).normal_(generator=generator)
    return drawn.contiguous(memory_format=torch.channels_last) if drawn.ndim == 4 else drawn
