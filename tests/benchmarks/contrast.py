"""What a step of contrastive methods costs beside the same method written with lightly, which users would pick else.

`make bench` installs lightly without what it depends on: of that its losses and heads need only torch and torchvision.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks import apart, synthetic
from tests.benchmarks.masked import built, in_turn
from tests.benchmarks.table import Row
from workloads.methods.base import Batch, Output, Progress
from workloads.methods.densecl import dense_pairs, match
from workloads.models.encoders import build_encoder
from workloads.parallel import Spread
from workloads.parts.ema import copy_of
from workloads.parts.queue_infonce import queue_info_nce
from workloads.parts.sharded_softmax import RowsOverRanks, instance_cross_entropy
from workloads.ranks import Ranks
from workloads.spec import JobSpec

DIM, QUEUE, INSTANCES = 128, 4096, 600_000
METHODS: dict[str, dict[str, Any]] = {
    "simclr": {"name": "simclr", "layers": 2},  # as many as lightly's head has
    "moco_v2": {"name": "moco_v2", "queue": QUEUE},
    "densecl": {"name": "densecl", "queue": QUEUE},
}
MAPS = {"options": {"output_stride": 8}}  # of DenseCL's network: maps of 4 x 4 rather than one place
JOB: dict[str, Any] = {
    "name": "bench-contrast",
    "method": METHODS["simclr"],
    "model": {"name": "resnet18", "image_size": 32},
    "batch_size": 256,
    "steps": 1,
}
LARGE = JOB | {"model": {"name": "resnet50", "image_size": 224}, "batch_size": 4}


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


class DenseCL(nn.Module):
    """As in lightly's own example."""

    def __init__(self, encoder: Any) -> None:
        from lightly.loss import NTXentLoss
        from lightly.models.modules.heads import DenseCLProjectionHead

        super().__init__()
        width = encoder.num_features
        heads = {name: DenseCLProjectionHead(width, width, DIM) for name in ("whole", "dense")}
        self.fast = nn.ModuleDict({"encoder": encoder, **heads})
        self.slow = copy_of(self.fast)
        self.whole, self.dense = (NTXentLoss(temperature=0.2, memory_bank_size=(QUEUE, DIM)) for _ in heads)

    def features(self, tower: Any, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        places = tower["encoder"].forward_features(images).flatten(2).transpose(1, 2)  # [B, S, C]
        return places, tower["whole"](places.mean(dim=1)), tower["dense"](places)

    def forward(self, batch: Batch, _: Progress) -> Output:
        from lightly.models.utils import select_most_similar, update_momentum

        update_momentum(self.fast, self.slow, 0.999)
        places, query, dense_query = self.features(self.fast, batch["image"])
        with torch.no_grad():
            other_places, key, dense_key = self.features(self.slow, batch["other"])
            dense_key = select_most_similar(places, other_places, dense_key)
        dense = self.dense(dense_query.flatten(0, 1), dense_key.flatten(0, 1))
        return Output((self.whole(query, key) + dense) / 2)


LIGHTLY: dict[str, type[nn.Module]] = {"simclr": SimCLR, "moco_v2": MoCo, "densecl": DenseCL}


def step_times(document: dict[str, Any], name: str, rounds: int) -> dict[str, list[float]]:
    """Seconds a step, round by round, of method `name` of ours, laid out as the loop does, and with lightly.

    Encoders and images are equal.
    """
    from workloads.models.timm_import import timm  # noqa: F401  # torchvision, which lightly imports, needs its help

    synthetic.one_thread()
    spec = JobSpec.model_validate({"data": {"train": {"shards": "synthetic"}}} | document)
    n, size = document["batch_size"], document["model"]["image_size"]
    batch = synthetic.images(n, size) | {"other": torch.rand(n, 3, size, size)}
    models = {"ours": built(document, METHODS[name]), "lightly": LIGHTLY[name](build_encoder(spec.model))}
    Spread(models["ours"], spec.engine, Ranks())
    return in_turn(models, batch, steps=1, rounds=rounds)


def dense_times(document: dict[str, Any], rounds: int) -> dict[str, Any]:
    """Seconds a step, round by round, of DenseCL, of MoCo v2, whose loss is its other half, and of the dense loss.

    Returns:
        These as `densecl`, `moco_v2`, `loss`; `predicted`, the ratio of the first two in FLOPs.
    """
    from workloads.flops import count

    synthetic.one_thread()
    spec = JobSpec.model_validate({"data": {"train": {"shards": "synthetic"}}} | document)
    n, size = document["batch_size"], document["model"]["image_size"]
    batch = synthetic.images(n, size) | {"other": torch.rand(n, 3, size, size)}
    methods: dict[str, Any] = {name: built(document, {"name": name}) for name in ("densecl", "moco_v2")}
    flops = {name: count(method, batch, synthetic.START) for name, method in methods.items()}
    assert flops["densecl"] is not None and flops["moco_v2"] is not None
    for method in methods.values():
        Spread(method, spec.engine, Ranks())
    methods["loss"] = DenseLoss(methods["densecl"], batch)
    return {**in_turn(methods, batch, 1, rounds), "predicted": flops["densecl"] / flops["moco_v2"]}


class DenseLoss(nn.Module):
    """Matching, pairs and their loss, of maps that are there: what DenseCL adds to MoCo v2 but for a head."""

    def __init__(self, method: Any, batch: Batch) -> None:
        super().__init__()
        self.rows, self.temperature = method.dense_queue.rows, method.config.temperature
        with torch.no_grad():
            (self.b_q, _, d_q), (self.b_k, _, self.d_k) = method.query(batch["image"]), method.key(batch["other"])
        self.d_q = nn.Parameter(d_q)

    def forward(self, _: Batch, __: Progress) -> Output:
        q, k = dense_pairs(self.d_q, self.d_k, match(self.b_q, self.b_k))
        return Output(queue_info_nce(q, k, self.rows, self.temperature)[0].mean())


def softmax_memory(instances: int) -> float:
    """Bytes of this rank at the peak of two steps of SGD over one row of 128 for each instance, without the rest.

    Freed memory goes back to the system here, as it does not where we train: kept, it leaves gaps by chance.
    """
    ranks = synthetic.own_rank()
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak begins anew
    before = _peak()
    table = RowsOverRanks(instances, DIM)
    table.share_out(ranks.device)
    optimizer = torch.optim.SGD(table.parameters(), lr=0.1, momentum=0.9)
    features, index = torch.randn(16, DIM, requires_grad=True), torch.arange(16)
    for _ in range(2):
        instance_cross_entropy(features, index, table, 0.15)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = _peak()
    synthetic.leave()
    return peak - before


def _peak() -> float:
    """Resident bytes of this process at most."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * float(line.split()[1])


def rows() -> list[Row]:
    """(what, measured, wanted, reached)."""
    made: list[Row] = []
    for name in METHODS:
        document = JOB | {"model": JOB["model"] | (MAPS if name == "densecl" else {})}
        seconds = apart.run(step_times, document=document, name=name, rounds=8)
        ratio = apart.ratio(seconds["ours"], seconds["lightly"])
        ours, theirs = (statistics.median(seconds[who]) for who in ("ours", "lightly"))
        measured = f"{ratio:.2f} ({ours:.2f} / {theirs:.2f} s)"
        made.append((f"contrast: step of {name} / with lightly, ResNet-18", measured, "<= 1.00", ratio <= 1.005))
    found = apart.run(dense_times, document=LARGE, rounds=5)
    ratio = apart.ratio(found["densecl"], found["moco_v2"])
    loss = apart.ratio(found["loss"], found["moco_v2"])
    what = "contrast: the dense loss / a step of MoCo v2, ResNet-50 at 224 px"
    made.append((what, f"{loss:.1%}", "< 5 %", loss < 0.05))
    one, two = (apart.run(softmax_memory, ranks=ranks, instances=INSTANCES) / INSTANCES for ranks in (1, 2))
    what = f"contrast: peak of a step of the softmax over {INSTANCES:,} rows, bytes a row: a rank of 2 / one rank"
    made.append((what, f"{two / one:.2f} ({two:,.0f} / {one:,.0f})", ".5, +- 10 %", abs(2 * two / one - 1) <= 0.1))
    what = "contrast: step of DenseCL, with its dense head / of MoCo v2, there; what their FLOPs predict"
    return [*made, (what, f"{ratio:.3f}; {found['predicted']:.3f}", "", None)]
