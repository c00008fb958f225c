import subprocess
import sys

import torch
from torch import nn

from workloads.data.manifest import open_manifest
from workloads.parts.optimizers import adamw


def _trained(make, steps: int = 7) -> list[torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.GELU(), nn.Linear(7, 3))
    optimizer = make(model)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(4, 5)).square().sum().backward()
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * group["lr_scale"]
        optimizer.step()
    return [parameter.detach() for parameter in model.parameters()]


def _groups(model: nn.Module) -> list[dict]:
    weights = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    biases = [parameter for parameter in model.parameters() if parameter.ndim == 1]
    return [{"params": weights, "lr_scale": 0.5}, {"params": biases, "weight_decay": 0.0}, {"params": []}]


def test_a_step_is_torchs_own():
    def torchs(model):
        groups = [group | {"lr_scale": group.get("lr_scale", 1.0)} for group in _groups(model) if group["params"]]
        return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    ours = _trained(lambda model: adamw(_groups(model), betas=(0.9, 0.95), weight_decay=0.1))
    for a, b in zip(ours, _trained(torchs), strict=True):
        assert torch.equal(a, b)


def test_each_group_keeps_its_own_decay_and_scale():
    optimizer = adamw(_groups(nn.Linear(2, 2)), betas=(0.9, 0.95), weight_decay=0.1)
    assert [(g["lr_scale"], g["weight_decay"]) for g in optimizer.param_groups] == [(0.5, 0.1), (1.0, 0.0)]


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
