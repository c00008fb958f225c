"""Steps of the optimizers of a job: torch's own where there is one, left out where `found_inf` says so."""

from __future__ import annotations

import copy
import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from workloads.data.manifest import open_manifest
from workloads.parts.optimizers import adamw, build
from workloads.parts.parameter_groups import groups
from workloads.spec_training import Optimizer

EVERY = [
    Optimizer(name="adamw", weight_decay=0.1),
    Optimizer(name="sgd", weight_decay=0.1, nesterov=True),
    Optimizer(name="sgd", weight_decay=0.1, momentum=0.0),
    Optimizer(name="lars", weight_decay=0.1, trust_coefficient=0.1),
    Optimizer(name="lamb", weight_decay=0.1, betas=(0.9, 0.999)),
]
every = pytest.mark.parametrize("options", EVERY, ids=lambda options: f"{options.name}-{options.momentum}")


def _net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))


def _step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, *, left_out: bool | None = None) -> None:
    """The gradient is one of (model, step); NaN in a step that is left out. None: `found_inf` is not set."""
    optimizer.zero_grad()
    inputs = torch.randn(4, 5, generator=torch.Generator().manual_seed(step))
    loss = model(inputs).square().sum() * (float("nan") if left_out else 1.0)
    loss.backward()
    for group in optimizer.param_groups:
        group["lr"] = 1e-2 * group["lr_scale"]
    if left_out is not None:
        optimizer.found_inf = torch.tensor(float(left_out))
    optimizer.step()


def _trained(make: Callable[[nn.Module], torch.optim.Optimizer], steps: int = 7) -> list[Tensor]:
    model = _net()
    optimizer = make(model)
    for step in range(steps):
        _step(model, optimizer, step)
    return [parameter.detach() for parameter in model.parameters()]


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Tensor]:
    moments = [v for slots in optimizer.state_dict()["state"].values() for _, v in sorted(slots.items())]
    return copy.deepcopy([*(p.detach() for p in model.parameters()), *(v for v in moments if v is not None)])


def _equal(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(torch.equal, a, b))


def _groups(model: nn.Module) -> list[dict]:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": weights, "lr_scale": 0.5}, {"params": biases, "weight_decay": 0.0}, {"params": []}]


def _torchs(options: Optimizer, model: nn.Module) -> torch.optim.Optimizer:
    own = [group | {"lr_scale": group.get("lr_scale", 1.0)} for group in _groups(model) if group["params"]]
    if options.name == "adamw":
        return torch.optim.AdamW(own, lr=0.0, betas=options.betas, weight_decay=0.1, fused=True)
    return torch.optim.SGD(
        own, lr=0.0, momentum=options.momentum, nesterov=options.nesterov, weight_decay=0.1, fused=True
    )


@pytest.mark.parametrize("options", EVERY[:3], ids=lambda options: f"{options.name}-{options.momentum}")
def test_a_step_is_torchs_own(options):
    ours = _trained(lambda model: build(_groups(model), options))
    assert _equal(ours, _trained(lambda model: _torchs(options, model)))


@every
def test_each_group_keeps_its_own_decay_and_scale(options):
    optimizer = build(_groups(nn.Linear(2, 2)), options)
    assert [(g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (1.0, 0.0)]


def test_adamw_is_what_build_makes():
    direct = _trained(lambda model: adamw(_groups(model), betas=(0.9, 0.95), weight_decay=0.1))
    assert _equal(direct, _trained(lambda model: build(_groups(model), EVERY[0])))


@every
@pytest.mark.parametrize("first", [0, 3])
def test_a_step_with_found_inf_never_was(options, first):
    """Also the very first one, when there are no moments yet."""
    model, plain = _net(), _net()
    optimizer, other = (build(groups(net.named_parameters()), options) for net in (model, plain))
    for step in range(first):
        _step(model, optimizer, step, left_out=False)
        _step(plain, other, step)
    assert _equal(_state(model, optimizer), _state(plain, other))
    weights, before = [p.detach().clone() for p in model.parameters()], _state(model, optimizer)
    _step(model, optimizer, 99, left_out=True)
    assert _equal(weights, [p.detach() for p in model.parameters()])
    if first:
        assert _equal(before, _state(model, optimizer))
    for step in range(first, first + 3):
        _step(model, optimizer, step, left_out=False)
        _step(plain, other, step)
        assert _equal(_state(model, optimizer), _state(plain, other))


@every
def test_a_restored_optimizer_goes_on_as_it_was(options):
    model = _net()
    optimizer = build(groups(model.named_parameters()), options)
    for step in range(3):
        _step(model, optimizer, step)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    other = copy.deepcopy(model)
    restored = build(groups(other.named_parameters()), options)
    restored.load_state_dict(torch.load(file, map_location="cpu", weights_only=True))
    for step in range(3, 6):
        _step(model, optimizer, step)
        _step(other, restored, step)
    assert _equal(_state(model, optimizer), _state(other, restored))


@every
def test_what_has_no_gradient_stays(options):
    model = _net()
    optimizer = build(groups(model.named_parameters()), options)
    idle = model[2].requires_grad_(False)
    before = idle.weight.clone()
    _step(model, optimizer, 0)
    assert torch.equal(idle.weight, before) and idle.weight not in optimizer.state


def _sharded(rank: int, store: str, out: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.FileStore(store, 2), rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    trained = []
    for options in EVERY:
        model = _net()
        fully_shard(model, mesh=mesh)
        optimizer = build(groups(model.named_parameters()), options)
        for step in range(5):
            _step(model, optimizer, step, left_out=step in (0, 3))
        trained.append([p.detach().full_tensor() for p in model.parameters()])
    if rank == 0:
        torch.save(trained, out)
    dist.destroy_process_group()


def test_weights_shared_out_over_two_ranks_are_trained_alike(tmp_path: Path):
    context = torch.multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_sharded, args=(r, f"{tmp_path}/store", f"{tmp_path}/out")) for r in (0, 1)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    for options, got in zip(EVERY, torch.load(tmp_path / "out", weights_only=True), strict=True):
        model = _net()
        optimizer = build(groups(model.named_parameters()), options)
        for step in (1, 2, 4):
            _step(model, optimizer, step)
        for a, b in zip(got, model.parameters(), strict=True):
            assert torch.allclose(a, b, rtol=1e-5, atol=1e-6), options.name


def test_no_optimizer_imports_the_compiler():
    script = """
import sys, torch
from workloads.parts.optimizers import build
from workloads.spec_training import Optimizer
for name in ("adamw", "sgd", "lars", "lamb"):
    weight = torch.ones(2, 2, requires_grad=True)
    optimizer = build([{"params": [weight]}], Optimizer(name=name))
    weight.sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    optimizer.load_state_dict(optimizer.state_dict())
print([name for name in ("torch._dynamo", "torch.distributed.tensor", "pandas", "timm") if name in sys.modules])
"""
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"


def test_a_run_starts_without_the_compiler_and_without_pandas(tmp_path, toy_job):
    """Each costs every start what it takes to import: 1 to 1.6 s, 0.3 s."""
    job = toy_job(epochs=None, steps=2)
    open_manifest(job.data["train"].shards)  # is kept from here on
    spec = tmp_path / "job.json"
    spec.write_text(job.model_dump_json())
    script = (
        "import sys; from pathlib import Path; from workloads.run import read_spec, run_local\n"
        f"assert run_local(read_spec(Path({str(spec)!r})), Path({str(tmp_path / 'out')!r})) == 0\n"
        "print([name for name in ('torch._dynamo', 'pandas', 'timm') if name in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.strip() == "[]"
