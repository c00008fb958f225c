"""How long a network takes: ms per image, measured on the device at hand.

By the protocol of Zen-NAS (arXiv 2102.01063) and GENet (arXiv 2006.14090): eval mode, no gradients, weights that mean
nothing, each BatchNorm folded into the convolution before it; after 3 warm-ups 10 timings, of which the 2 fastest and
the 2 slowest do not count. Maps are channels-last, which tensor cores want and which is faster on CPUs too (GENet-light
12 %, ZenNet-400M 27 % on one core). Numbers of other batch sizes, precisions or devices do not compare.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

Precision = Literal["fp16", "fp32"]
DTYPE = {"fp16": torch.float16, "fp32": torch.float32}
WARM_UPS, TIMINGS, OUTER = 3, 10, 2
SHORTEST_S = 0.002  # of a timing: shorter runs are repeated, or it is the clock and the launch that are timed


def expect_precision(precision: Precision, device: torch.device) -> None:
    """Refuses what the device does not do in hardware.

    Raises:
        ValueError: fp16 on a CPU.
    """
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("got precision fp16 on a CPU, whose numbers would say nothing; measure in fp32 there")


def folded(network: nn.Module) -> nn.Module:
    """A copy in eval mode, in which each BatchNorm right behind a convolution of an `nn.Sequential` is part of it."""
    network = copy.deepcopy(network).eval()
    for row in [module for module in network.modules() if isinstance(module, nn.Sequential)]:
        for i in range(1, len(row)):
            conv, norm = row[i - 1], row[i]
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                row[i - 1], row[i] = fuse_conv_bn_eval(conv, norm), nn.Identity()
    return network


def placed(network: nn.Module, device: torch.device, precision: Precision) -> nn.Module:
    """The network as it is timed; one without values (of the meta device) gets some."""
    if any(tensor.is_meta for tensor in network.state_dict().values()):
        network = network.to_empty(device=device)
        for tensor in network.state_dict().values():
            # Small, never 0 or what the memory held: CPUs take far longer over subnormals and NaN.
            tensor.fill_(0.01)
    return network.to(device, DTYPE[precision]).to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def timed(run: Callable[[], object], device: torch.device, clock: Callable[[], float] = time.perf_counter) -> float:
    """Milliseconds of one run.

    Args:
        run: what is timed.
        device: that it computes on; CUDA is waited for.
        clock: seconds.
    """

    def seconds(repeats: int) -> float:
        _wait(device)
        began = clock()
        for _ in range(repeats):
            run()
        _wait(device)
        return clock() - began

    for _ in range(WARM_UPS - 1):
        run()
    repeats = max(1, math.ceil(SHORTEST_S / max(seconds(1), 1e-6)))  # the last warm-up says how many
    timings = sorted(seconds(repeats) for _ in range(TIMINGS))[OUTER:-OUTER]
    return 1000 * sum(timings) / len(timings) / repeats


def measure(
    network: nn.Module,
    *,
    size: int,
    batch_size: int = 64,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Milliseconds per image of a network of images, [B, 3, H, W] -> anything.

    Args:
        network: stays as it is; one on the meta device will do.
        size: side of the images.
        batch_size: of the images that go through it at once.
        precision: of weights and maps.
        device: to measure on.
        clock: seconds.

    Raises:
        ValueError: the device does not do that precision.
    """
    device = torch.device(device)
    expect_precision(precision, device)
    network = placed(folded(network), device, precision)
    generator = torch.Generator(device).manual_seed(0)
    images = torch.randn(batch_size, 3, size, size, generator=generator, device=device, dtype=DTYPE[precision])
    images = images.contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        return timed(lambda: network(images), device, clock) / batch_size


def device_name(device: torch.device) -> str:
    """As tables and reports state it: `NVIDIA H100 80GB HBM3`, or `cpu, 4 threads`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads"


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
