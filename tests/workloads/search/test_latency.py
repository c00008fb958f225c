"""Latency by a clock that the tests set, so that nothing depends on how busy the machine is; one real measurement."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from workloads.models.genet import Block, GENet
from workloads.search.latency import SHORTEST_S, folded, measure, timed

CPU = torch.device("cpu")
TINY = (Block("XX", 8, 1, 2), Block("BL", 16, 1, 2), Block("DW", 16, 1, 1))


class Clock:
    """Seconds that pass only in `run`."""

    def __init__(self, durations: list[float]) -> None:
        self.now, self.runs, self.durations = 0.0, 0, durations

    def __call__(self) -> float:
        return self.now

    def run(self) -> None:
        self.now += self.durations[min(self.runs, len(self.durations) - 1)]
        self.runs += 1


def test_the_outer_timings_and_the_warm_ups_do_not_count() -> None:
    clock = Clock([90, 90, 90, 7, 1, 2, 3, 4, 5, 6, 100, 0.5, 8])
    # sorted: .5 1 | 2 3 4 5 6 7 | 8 100
    assert timed(clock.run, CPU, clock) == pytest.approx(1000 * (2 + 3 + 4 + 5 + 6 + 7) / 6)
    assert clock.runs == 3 + 10


def test_short_runs_are_repeated_within_a_timing() -> None:
    clock = Clock([SHORTEST_S / 4])
    assert timed(clock.run, CPU, clock) == pytest.approx(1000 * SHORTEST_S / 4)
    assert clock.runs == 3 + 10 * 4


def test_ms_are_for_one_image() -> None:
    clock = Clock([0.048])

    class Slow(nn.Module):
        def forward(self, images: Tensor) -> Tensor:
            assert images.shape == (12, 3, 8, 8) and images.is_contiguous(memory_format=torch.channels_last)
            assert not torch.is_grad_enabled() and not self.training
            clock.run()
            return images

    assert measure(Slow(), size=8, batch_size=12, clock=clock) == pytest.approx(4)


def test_folding_changes_no_output() -> None:
    torch.manual_seed(0)
    network = GENet(8, TINY, 24, num_classes=5)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 2)  # type: ignore[arg-type]
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    before = copy.deepcopy(network.state_dict())
    images = torch.randn(2, 3, 32, 32)
    plain = folded(network)
    assert not any(isinstance(module, nn.BatchNorm2d) for module in plain.modules())
    assert network.training and not plain.training
    torch.testing.assert_close(plain(images), network.eval()(images), rtol=1e-4, atol=1e-5)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


def test_a_norm_that_is_behind_no_convolution_stays() -> None:
    row = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.ReLU(), nn.BatchNorm2d(4))
    assert sum(isinstance(module, nn.BatchNorm2d) for module in folded(row)) == 2


def test_a_real_network_without_values_is_measured_and_stays_without() -> None:
    """More of the same work takes longer: 64 times the places."""
    with torch.device("meta"):
        network = GENet(8, TINY, 24)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    small, large = (measure(network, size=size, batch_size=2) for size in (32, 256))
    assert 0 < small < large
    assert all(p.is_meta for p in network.parameters()) and torch.equal(state, torch.get_rng_state())


def test_half_precision_is_not_measured_on_a_cpu() -> None:
    with pytest.raises(ValueError, match=r"got precision fp16 on a CPU.*fp32"):
        measure(nn.Identity(), size=8, precision="fp16")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_in_half_precision() -> None:
    network = GENet(16, TINY, 32)
    assert 0 < measure(network, size=64, precision="fp16", device="cuda") < measure(network, size=64) * 10
