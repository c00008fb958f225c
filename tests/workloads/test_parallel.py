"""Blocks are found by shape; what is done to them changes the speed, not the numbers."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from tests.toy import difference
from workloads import agreement, checkpoint
from workloads.export import export
from workloads.models.timm_import import timm
from workloads.parallel import Spread, _shards, blocks_of
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import Engine
from workloads.step import Stepper
from workloads.train import train

Make = Callable[..., JobSpec]


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.GELU())


def test_blocks_are_repeated_siblings_the_outermost_ones() -> None:
    inner = nn.ModuleList([block(), block()])
    outer = nn.ModuleList([nn.ModuleDict({"inner": inner}), nn.ModuleDict({"inner": nn.ModuleList([block()])})])
    net = nn.ModuleDict({"stem": nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), "stages": outer})
    assert blocks_of(net) == list(outer)
    assert blocks_of(nn.ModuleDict({"a": inner, "head": nn.Linear(4, 2)})) == list(inner)
    assert blocks_of(nn.Linear(4, 4)) == []


def weights(run: RunFolder) -> dict[str, torch.Tensor]:
    return torch.load(run.checkpoints / "step-00000020.pt", weights_only=True)["method"]


def test_activation_checkpointing_computes_the_same(
    toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = {"name": "fine_tune", "drop_path": 0.3}  # whose random numbers must come again in backward
    runs = [RunFolder(tmp_path / name) for name in ("plain", "again")]
    for run, on in zip(runs, (False, True), strict=True):
        assert train(toy_job(method=method, engine={"activation_checkpointing": on}), run, tmp_path)
    plain, again = map(weights, runs)
    assert plain.keys() == again.keys() and all(torch.equal(plain[name], again[name]) for name in plain)


@pytest.mark.parametrize("again", [False, True])
def test_each_block_is_compiled_and_nothing_else(monkeypatch: pytest.MonkeyPatch, again: bool) -> None:
    calls: list[nn.Module] = []

    def counted(forward: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(x: torch.Tensor) -> torch.Tensor:
            calls.append(forward.__self__)  # type: ignore[attr-defined]
            return forward(x)

        return call

    monkeypatch.setattr(torch, "compile", counted)
    net = nn.Sequential(nn.ModuleDict({"blocks": nn.ModuleList([block(), block()])}), nn.Linear(4, 2))
    Spread(net, Engine(compile=True, activation_checkpointing=again), Ranks())
    first, second = net[0]["blocks"]
    net[1](second(first(torch.ones(2, 4)))).sum().backward()
    assert calls == ([first, second, second, first] if again else [first, second])


def test_each_gradient_is_shortened_by_its_own_length() -> None:
    long, short = torch.tensor([[3.0, 4.0]]), torch.tensor([0.3, -0.4, 0.0])
    Spread(nn.Linear(2, 1), Engine(), Ranks()).clip_each([long, short], 1.0)
    assert torch.allclose(long, torch.tensor([[0.6, 0.8]]), atol=1e-6)
    assert torch.equal(short, torch.tensor([0.3, -0.4, 0.0]))


CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("strategy", "device", "memory", "shards"),
    [
        ("auto", CUDA, 3 * 16 * 96, False),  # 96 trained numbers with gradients and moments fill a third of it
        ("auto", CUDA, 3 * 16 * 96 - 1, True),
        ("auto", torch.device("cpu"), 1, False),
        ("ddp", CUDA, 1, False),
        ("fsdp", CUDA, 1 << 40, True),
    ],
)
def test_auto_shards_what_a_gpu_would_not_hold(
    strategy: Any, device: torch.device, memory: int, shards: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = {CUDA: SimpleNamespace(total_memory=memory)}
    monkeypatch.setattr(torch.cuda, "get_device_properties", gpu.__getitem__)
    net = nn.ModuleDict(
        {"trained": nn.Linear(12, 8, bias=False), "frozen": nn.Linear(1000, 1000).requires_grad_(False)}
    )
    assert _shards(net, Engine(strategy=strategy), device) is shards


def test_channels_last_is_the_layout_of_weights_and_images_and_changes_no_number(
    toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[bool, bool]] = []
    call = Stepper.__call__

    def look(self: Stepper, streams: Any, progress: Any) -> Any:
        of_step = streams["train"]["image"], max(self._parameters, key=lambda p: p.ndim)  # a kernel [out, in, 3, 3]
        seen.append(tuple(tensor.is_contiguous(memory_format=torch.channels_last) for tensor in of_step))  # type: ignore[arg-type]
        return call(self, streams, progress)

    monkeypatch.setattr(Stepper, "__call__", look)
    curves = []
    for on in (False, True, None):
        model = {"name": "resnet_cifar", "image_size": 16, "depth": 8}
        run = RunFolder(tmp_path / str(on))
        spec = toy_job(model=model, method={"name": "fine_tune"}, epochs=None, steps=1, engine={"channels_last": on})
        assert train(spec, run, tmp_path)
        curves += run.read_metrics()
    assert seen == [(False, False), (True, True), (True, True)]
    for name in ("loss", "grad_norm"):
        assert curves[1][name] == pytest.approx(curves[0][name], rel=1e-4)
        assert curves[2][name] == curves[1][name]


@pytest.mark.parametrize(
    ("model", "convolves"),
    [
        ("vit_base_patch16_224", False),
        ("swin_tiny_patch4_window7_224", False),
        ("convnext_tiny", True),
        ("resnet50", True),
        ("mobilenetv3_small_050", True),
    ],
)
def test_networks_of_convolutions_are_told_by_windows_that_overlap(model: str, convolves: bool) -> None:
    with torch.device("meta"):
        network = timm.create_model(model)
    assert Spread(network, Engine(), Ranks()).channels_last is convolves


def _rank(rank: int, port: int, spec: str, folder: str) -> None:
    torch.set_num_threads(1)
    agreement.POLL_S = 0.0  # ask after each step
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    run, job, polls = RunFolder(Path(folder)), JobSpec.model_validate_json(spec), iter(range(100))
    try:
        assert not train(job, run, run.path, Ranks(rank, 2), should_stop=lambda: rank == 1 and next(polls) == 7)
        assert checkpoint.latest_step(run.checkpoints) == 8
        assert train(job, run, run.path, Ranks(rank, 2))
    finally:
        dist.destroy_process_group()


def test_two_sharded_ranks_stopped_and_resumed_end_as_one_process_does(toy_job: Make, tmp_path: Path) -> None:
    clip = {"clip_grad_norm": 0.5, "clip_parameter_norm": 0.05}
    common = {"micro_batch_size": 4, "optimizer": {"name": "sgd", "lr": 0.1} | clip}
    one, two = RunFolder(tmp_path / "one"), RunFolder(tmp_path / "two")
    assert train(toy_job(**common), one, tmp_path)
    spec = toy_job(**common, resources={"workers": 2}, engine={"strategy": "fsdp"})
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    torch.multiprocessing.spawn(_rank, (port, spec.model_dump_json(), str(two.path)), nprocs=2)
    export(toy_job(**common), one, tmp_path, "one")
    export(spec, two, tmp_path, "two")
    from safetensors.torch import load_file

    a, b = (load_file(run.artifact / "method.safetensors") for run in (one, two))
    assert difference(a, b) < 5e-5
    curves = [{point["step"]: point["loss"] for point in run.read_metrics()} for run in (one, two)]
    assert set(curves[1]) == {5, 8, 10, 15, 20}  # 8: the stop; 10 is then the mean of two steps
    assert [curves[1][step] for step in (5, 15, 20)] == pytest.approx(
        [curves[0][step] for step in (5, 15, 20)], abs=1e-5
    )
