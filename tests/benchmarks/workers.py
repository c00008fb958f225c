"""Two workers under Ray Train against two under torchrun, each with DDP over gloo and one thread.

Both groups are there all the time and take turns of a few seconds, so that the machine's mood hits both: the job as the
service runs it, but that it waits after its turn, and the shortest loop of PyTorch's DDP, beside which the actors of
the job are stopped, since they too take from the cores. What an idle cluster takes (see `growth`) runs beside both.
Both groups decode and augment the same shards by the same reader, in threads beside the training, since with two ranks
on two cores there is nowhere else to do it. Compared is the steady state.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import psutil

from tests.benchmarks import apart
from tests.benchmarks.loop import MEASURED, UNMEASURED
from workloads.methods.base import Progress
from workloads.record import RunFolder
from workloads.spec import JobSpec

TURN = UNMEASURED + MEASURED  # steps
RATES = "ours.json"


def wait_for(path: Path) -> None:
    deadline = time.monotonic() + apart.LIMIT_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise TimeoutError(f"got no {path.name} in {apart.LIMIT_S:g} s; the other group has failed")
        time.sleep(0.1)


@contextlib.contextmanager
def actors_stopped(head: int) -> Iterator[None]:
    """No actor on this node does anything."""
    below = psutil.Process(head).children(recursive=True)
    processes = [one for one in below if one.name().startswith("ray::") and not one.name().endswith("Agent")]
    try:
        for process in processes:
            process.suspend()
        yield
    finally:
        for process in processes:
            process.resume()


def bare(document: dict[str, Any], folder: str, rounds: int, head: int) -> list[float]:
    """Under torchrun: steps/s of each turn, each of which begins when `ours` has ended one.

    Args:
        document: of a job.
        folder: by which the groups take turns.
        rounds: turns.
        head: the process of the cluster's head.
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
    raw = reader.batches(0, rounds * TURN, ranks.rank, ranks.world_size)
    batches = ahead((to_device(batch, views, ranks.device) for batch in raw), depth=1)
    model = DistributedDataParallel(method)
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)
    rates = []
    for i in range(rounds):
        wait_for(Path(folder) / f"bare-{i}")
        with actors_stopped(head) if ranks.rank == 0 else contextlib.nullcontext():
            dist.barrier()
            for step in range(TURN):
                if step == UNMEASURED:
                    began = time.perf_counter()
                optimizer.zero_grad()
                model(next(batches), Progress(step, 0, TURN)).loss.backward()
                optimizer.step()
            rates.append(MEASURED / (time.perf_counter() - began))
            dist.barrier()
        if ranks.rank == 0:
            (Path(folder) / f"ours-{i + 1}").touch()
    batches.close()
    del model
    synthetic.leave()
    return rates


def ours(spec_json: str, run: RunFolder, home: Path, variables: dict[str, str]) -> None:
    """What Ray Train runs on each worker: the product's own, which waits after each turn for that of `bare`."""
    import torch.distributed as dist

    from workloads import ray_train
    from workloads.methods.mae import MAE

    rates: list[float] = []
    began = 0.0

    def after_step(self: MAE, progress: Progress) -> None:
        nonlocal began
        inside = (progress.step + 1) % TURN
        if inside == UNMEASURED:
            began = time.perf_counter()
        elif inside == 0:
            rates.append(MEASURED / (time.perf_counter() - began))
            if dist.get_rank() == 0:  # the other may be stopped before it knows its rate
                (home / RATES).write_text(json.dumps(rates))
                (home / f"bare-{len(rates) - 1}").touch()
            wait_for(home / f"ours-{len(rates)}")

    with mock.patch.object(MAE, "after_step", after_step):
        ray_train.worker(spec_json, run, home, variables)


def rates(document: dict[str, Any], folder: str, rounds: int, head: int) -> dict[str, list[float]]:
    """Steps/s of each round, `ours` and `bare`, the warm-up left out; needs a connected cluster.

    Args:
        document: of a job of two workers by MAE.
        folder: is made.
        rounds: turns of each, beside the first.
        head: the process of the cluster's head.
    """
    from workloads import ray_train

    home = Path(folder)
    home.mkdir()
    document = document | {"steps": (rounds + 1) * TURN}
    run = RunFolder(home / "run")
    run.path.mkdir()
    with (
        apart.started(bare, ranks=2, document=document, folder=folder, rounds=rounds + 1, head=head) as result,
        mock.patch.object(ray_train, "WORKER", f"{__name__}:{ours.__name__}"),
    ):
        assert ray_train.train_on_ray(JobSpec.model_validate(document), run, home, connected=lambda: None)
        by_group = {"ours": json.loads((home / RATES).read_text()), "bare": result()}
    return {name: of_all[1:] for name, of_all in by_group.items()}


def rates_on_own_cluster(document: dict[str, Any], folder: str, rounds: int) -> dict[str, list[float]]:
    """`rates` on a cluster that is there for nothing else."""
    with apart.own_cluster(Path(f"{folder}-home")) as head:
        return rates(document, folder, rounds, head.pid)
