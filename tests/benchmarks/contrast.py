"""What a step of contrastive methods costs beside the same method written with lightly, which users would pick else.

`make bench` installs lightly without what it depends on: of that its losses and heads need only torch and torchvision.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks import apart, synthetic
from tests.benchmarks.masked import built, in_turn
from tests.benchmarks.table import Row
from workloads.methods.base import Batch, Output, Progress
from workloads.models.encoders import build_encoder
from workloads.parts.ema import copy_of
from workloads.spec import JobSpec

DIM, QUEUE = 128, 4096
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"name": "simclr", "layers": 2},  # as many as lightly's head has
    "moco_v2": {"name": "moco_v2", "queue": QUEUE},
}
JOB: dict[str, Any] = {
    "name": "bench-contrast",
    "method": METHODS["simclr"],
    "model": {"name": "resnet18", "image_size": 32},
    "batch_size": 256,
    "steps": 1,
}


class SimCLR(nn.Module):
    """As in lightly's own example."""

    def __init__(self, encoder: Any) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import SimCLRProjectionHead

        super().__init__()
        width = encoder.num_features
        self.encoder, self.head = encoder, SimCLRProjectionHead(width, width, DIM)
        self.criterion = NTXentLoss(temperature=0.1)

    def forward(self, batch: Batch, _: Progress) -> Output:
        one, two = (self.head(self.encoder(batch[name])) for name in ("image", "other"))
        return Output(self.criterion(one, two))


class MoCo(nn.Module):
    """As in lightly's own example."""

    def __init__(self, encoder: Any) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import MoCoProjectionHead

        super().__init__()
        width = encoder.num_features
        self.fast = nn.Sequential(encoder, MoCoProjectionHead(width, width, DIM))
        self.slow = copy_of(self.fast)
        self.criterion = NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM))

    def forward(self, batch: Batch, _: Progress) -> Output:
        from lightly.models.utils import update_momentum

        update_momentum(self.fast, self.slow, 0.999)
        query: Tensor = self.fast(batch["image"])
        with torch.no_grad():
            key = self.slow(batch["other"])
        return Output(self.criterion(query, key))


LIGHTLY: dict[str, type[nn.Module]] = {"simclr": SimCLR, "moco_v2": MoCo}


def step_times(document: dict[str, Any], name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a step, round by round, of method `name` of ours and with lightly, on equal encoders and images."""
    from workloads.models.timm_import import timm  # noqa: F401  # torchvision, which lightly imports, needs its help

    synthetic.one_thread()
    spec = JobSpec.model_validate({"data": {"train": {"shards": "synthetic"}}} | document)
    n, size = document["batch_size"], document["model"]["image_size"]
    batch = synthetic.images(n, size) | {"other": torch.rand(n, 3, size, size)}
    models = {"ours": built(document, METHODS[name]), "lightly": LIGHTLY[name](build_encoder(spec.model))}
    return in_turn(models, batch, steps=1, rounds=rounds)


def rows() -> list[Row]:
    """(what, measured, wanted, reached)."""
    made: list[Row] = []
    for name in METHODS:
        seconds = apart.run(step_times, document=JOB, name=name, rounds=8)
        ratio = apart.ratio(seconds["ours"], seconds["lightly"])
        ours, theirs = (statistics.median(seconds[who]) for who in ("ours", "lightly"))
        measured = f"{ratio:.2f} ({ours:.2f} / {theirs:.2f} s)"
        made.append((f"contrast: step of {name} / with lightly, ResNet-18", measured, "<= 1.00", ratio <= 1.005))
    return made
