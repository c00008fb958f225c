"""FLOPs against closed formulas; counting leaves no trace."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.toy import random_images
from tests.workloads.methods.test_fine_tune import fine_tune
from tests.workloads.methods.test_mae import START, mae
from workloads import assemble, monitor
from workloads.flops import count, mfu, peak, peak_of
from workloads.methods.base import Batch, Method, MethodConfig, Output, Progress
from workloads.ranks import Ranks
from workloads.spec import JobSpec

B, L, P = 4, 16, 4  # images of 16 x 16 in patches of 4 x 4


def blocks(depth: int, tokens: int, dim: int) -> int:
    """Forward: qkv, scores and values, projection, MLP of ratio 4; 2 a multiply-add."""
    linear = 2 * B * tokens * (3 * dim * dim + dim * dim + 8 * dim * dim)
    attention = 2 * 2 * B * tokens * tokens * dim
    return depth * (linear + attention)


def test_mae_by_formula() -> None:
    """Only a quarter of the patches is encoded; backward is twice forward but for what has no gradient to pass on."""
    patch_embed = 2 * B * L * 3 * P * P * 32
    heads = 2 * B * (1 + L // 4) * 32 * 16 + 2 * B * (1 + L) * 16 * 3 * P * P
    forward = blocks(2, 1 + L // 4, 32) + blocks(1, 1 + L, 16) + heads
    assert count(mae(), random_images(), START) == 3 * forward + 2 * patch_embed  # images get no gradient


def test_fine_tune_by_formula() -> None:
    patch_embed = 2 * B * L * 3 * P * P * 16
    forward = blocks(2, 1 + L, 16) + 2 * B * 16 * 3
    assert count(fine_tune(2, drop_path=0.5), random_images(), START) == 3 * forward + 2 * patch_embed


def test_counts_grow_with_the_batch() -> None:
    one, four = count(mae(), random_images(1), START), count(mae(), random_images(4), START)
    assert one is not None and four == 4 * one


class Toy(Method):
    """A convolution under BatchNorm with dropout, a teacher outside the module tree, and a queue that moves."""

    Config = MethodConfig
    queue: Tensor

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Dropout(0.5))
        self.teacher = (nn.Conv2d(3, 4, 3, bias=False).requires_grad_(False),)
        self.register_buffer("queue", torch.zeros(2, 4))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        difference = self.encoder(batch["image"]) - self.teacher[0](batch["image"])
        self.queue[0] = difference.detach().mean((0, 2, 3)) + torch.rand(4, device=difference.device)
        return Output(difference.square().mean())


class Decides(Toy):
    def forward(self, batch: Batch, progress: Progress) -> Output:
        output = super().forward(batch, progress)
        return output if output.loss is not None and output.loss.item() > 0 else Output(None)


class Fills(Toy):
    def forward(self, batch: Batch, progress: Progress) -> Output:
        return Output(None)


def test_counting_leaves_no_trace() -> None:
    torch.manual_seed(0)
    method, images = Toy().train(), torch.randn(2, 3, 8, 8)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    teacher, generator, given = method.teacher[0].weight, torch.get_rng_state(), images.clone()
    with torch.no_grad():  # whatever the caller is in
        flops = count(method, {"image": images}, START)
    convolution = 2 * 2 * 6 * 6 * 4 * 3 * 9
    assert flops == 3 * convolution  # student forward and weights, teacher forward
    assert torch.equal(torch.get_rng_state(), generator) and torch.equal(images, given)
    assert method.teacher[0].weight is teacher and teacher.device.type == "cpu"
    assert method.training and all(p.grad is None for p in method.parameters())
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())


def test_counting_takes_no_memory_for_weights() -> None:
    method = Toy()
    method.huge = nn.Parameter(torch.zeros(1).expand(2**40))  # whose copy would be 4 TB
    assert count(method, {"image": torch.zeros(2, 3, 8, 8)}, START) is not None


@pytest.mark.parametrize(("cls", "reason"), [(Decides, "meta"), (Fills, "no loss at step 0")])
def test_uncountable_methods_say_why(cls: type[Toy], reason: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    assert count(cls(), {"image": torch.zeros(2, 3, 8, 8)}, START) is None
    assert f"FLOPs of {cls.__name__} are not counted" in caplog.text and reason in caplog.text


def test_streams_are_counted_together() -> None:
    class Two(Toy):
        streams = ("a", "b")

        def forward(self, batch: dict[str, Any], progress: Progress) -> Output:  # type: ignore[override]
            return Output(F.mse_loss(self.encoder(batch["a"]["image"]), self.encoder(batch["b"]["image"])))

    part = {"image": torch.zeros(2, 3, 8, 8)}
    assert count(Two(), {"a": part, "b": part}, START) == 2 * 2 * (2 * 2 * 6 * 6 * 4 * 3 * 9)


@pytest.mark.parametrize(
    ("name", "fp32", "bf16", "fp16"),
    [
        ("Tesla V100-SXM2-16GB", 15.7, None, 125),
        ("Tesla V100-PCIE-32GB", 14.0, None, 112),
        ("Tesla T4", 8.1, None, 65),
        ("NVIDIA A10", 31.2, 125, 125),
        ("NVIDIA A10G", 31.52, 70, 70),
        ("NVIDIA L4", 30.3, 121, 121),
        ("NVIDIA L40S", 91.6, 362.05, 362.05),
        ("NVIDIA A100-SXM4-80GB", 19.5, 312, 312),
        ("NVIDIA A100 80GB PCIe", 19.5, 312, 312),
        ("NVIDIA H100 80GB HBM3", 67, 989.4, 989.4),
        ("NVIDIA H100 PCIe", 51, 756, 756),
        ("NVIDIA H200", 67, 989.4, 989.4),
        ("NVIDIA B200", 75, 2250, 2250),
        ("NVIDIA L40", None, None, None),
        ("NVIDIA GH200 480GB", None, None, None),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None, None, None),
        ("NVIDIA GeForce RTX 4090", None, None, None),
        ("AMD Instinct MI300X", None, None, None),
    ],
)
def test_peaks(name: str, fp32: float | None, bf16: float | None, fp16: float | None) -> None:
    for precision, tera in (("fp32", fp32), ("bf16", bf16), ("fp16", fp16)):
        assert peak_of(name, precision) == (None if tera is None else pytest.approx(tera * 1e12)), precision


def test_a_step_is_counted_by_one_micro_batch_and_no_more_is_decoded(
    toy_job: Callable[..., JobSpec], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "peak", lambda *_: 1e12)
    decoded: list[int] = []
    to_device = monitor.to_device

    def moved(batch: Batch, views: Any, device: torch.device) -> Batch:
        decoded.append(len(batch["index"]))
        return to_device(batch, views, device)

    monkeypatch.setattr(monitor, "to_device", moved)
    found = []
    for changes in ({}, {"micro_batch_size": 2}, {"resources": {"workers": 2}, "micro_batch_size": 2}):
        spec = toy_job(**changes)
        manifest = assemble.open_stream(spec.data["train"])
        method = assemble.build_method(spec, assemble.data_info(spec, manifest), Path())
        readers, views = assemble.readers_of(spec, {"train": manifest}), assemble.views_of(spec)
        found.append(monitor.flops_of_step(spec, method, readers, views, Ranks(device=torch.device("cuda"))))
    assert decoded == [8, 2, 2]
    assert found[0] and found == [found[0]] * 3


def test_a_cpu_has_no_known_peak() -> None:
    assert peak(torch.device("cpu"), "fp32") is None


def test_mfu() -> None:
    assert mfu(flops_per_step=4e12, step_time_s=0.5, peak=1e13, devices=2) == pytest.approx(0.4)
