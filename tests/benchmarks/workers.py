"""Two workers under Ray Train against two under torchrun, each with DDP over gloo and one thread.

They take turns: a job is run as the service runs it while the ranks of torchrun sleep, then these train. Both decode
and augment the same shards by the same reader, in threads beside the training, since with two ranks on two cores there
is nowhere else to do it. Compared is the steady state, so the loop, its exchange, and what Ray's processes take from
the cores; no start.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path
from typing import Any

from tests.benchmarks import apart
from workloads.methods.base import Progress
from workloads.record import RunFolder
from workloads.spec import JobSpec

STARTING = 2  # points of the curve in which a group still imports and fills its caches


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + apart.LIMIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"got no {path.name} in {apart.LIMIT_S:g} s; the other group has failed")
        time.sleep(0.02)


def bare(document: dict[str, Any], turns: str, rounds: int) -> list[float]:
    """Under torchrun: the shortest loop of PyTorch's DDP.

    Returns:
        steps/s of each round: median over intervals of `log_steps` steps without the first ones, as for `ours`.
    """
    import torch
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    from tests.benchmarks import synthetic
    from workloads import assemble
    from workloads.batches import to_device
    from workloads.data.ahead import ahead
    from workloads.data.reader import Reader

    synthetic.one_thread()
    ranks = synthetic.own_rank()
    spec, method = synthetic.build(document)
    views = assemble.views_of(spec)
    reader = Reader(assemble.open_stream(spec.data["train"]), views, batch_size=spec.batch_size)
    steps = spec.steps or 0
    raw = reader.batches(0, rounds * steps, ranks.rank, ranks.world_size)
    batches = ahead((to_device(batch, views, ranks.device) for batch in raw), depth=1)
    model = DistributedDataParallel(method)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)
    rates = []
    for i in range(rounds):
        wait_for(Path(turns) / f"go-{i}")
        stamps = [time.perf_counter()]
        for step in range(steps):
            optimizer.zero_grad()
            model(next(batches), Progress(step, 0, steps)).loss.backward()
            optimizer.step()
            if (step + 1) % spec.log_steps == 0:
                stamps.append(time.perf_counter())
        intervals = [after - before for before, after in itertools.pairwise(stamps[STARTING:])]
        rates.append(spec.log_steps / statistics.median(intervals))
        dist.barrier()
        if ranks.rank == 0:
            (Path(turns) / f"bare-{i}").touch()
    batches.close()
    del model
    synthetic.leave()
    return rates


def rates(document: dict[str, Any], folder: str, rounds: int) -> dict[str, list[float]]:
    """Steps/s of each round, `ours` and `bare`; needs a connected cluster.

    Args:
        document: of a job of two workers, of more points of the curve than are `STARTING`.
        folder: is made.
        rounds: turns of each.
    """
    from workloads.ray_train import train_on_ray

    turns = Path(folder)
    turns.mkdir()
    spec = JobSpec.model_validate(document)
    own_rates = []
    with apart.started(bare, ranks=2, document=document, turns=folder, rounds=rounds) as result:
        for i in range(rounds):
            (turns / f"go-{i}").touch()
            wait_for(turns / f"bare-{i}")
            run = RunFolder(turns / f"run-{i}")
            run.path.mkdir()
            assert train_on_ray(spec, run, turns, connected=lambda: None)
            points = list(run.read_metrics())
            own_rates.append(1 / statistics.median(point["step_time_s"] for point in points[STARTING:]))
        return {"ours": own_rates, "bare": result()}


def rates_on_own_cluster(document: dict[str, Any], folder: str, rounds: int) -> dict[str, list[float]]:
    """`rates` on a cluster that is there for nothing else."""
    with apart.own_cluster(Path(f"{folder}-home")):
        return rates(document, folder, rounds)
