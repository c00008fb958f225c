"""The adapter to Ray Train: one group of workers, each in the same loop as everywhere else.

Checkpoints are ours, so Train only starts, watches and restarts the group. It is used
without its torch backend, whose rendezvous store would listen on every interface: the
process group is made here, on the address that Ray itself uses.
"""

from __future__ import annotations

import json
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workloads import assemble, checkpoint
from workloads.data.allocator import keep_freed_memory
from workloads.data.manifest import DataError
from workloads.guards import CollapseError, DivergenceError
from workloads.metrics import NonFiniteLossError
from workloads.ranks import Ranks
from workloads.ray_scan import on_cluster
from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec

logger = logging.getLogger(__name__)

MAX_WORKER_FAILURES = 5
COLLECTIVE_TIMEOUT = timedelta(minutes=10)
LAST_CALL = "manta/last_call"
FINAL = (DataError, NonFiniteLossError, DivergenceError, CollapseError, checkpoint.CheckpointError, ValueError)
"""Would happen again."""


class TrainingFailedError(RuntimeError):
    """A failure that a worker reported as final; keeps its hint."""

    def __init__(self, message: str, hint: str | None) -> None:
        self.hint = hint
        super().__init__(message)


def train_on_ray(spec: JobSpec, run: RunFolder, home: Path, *, connected: Callable[[], None]) -> bool:
    """Runs the loop on `spec.resources.workers` Ray workers, restarted from the last checkpoint when one dies.

    Args:
        spec: the job.
        run: its folder, on storage that all workers see.
        home: where references to weights are looked up.
        connected: called after `ray.init`, which replaces signal handlers.

    Returns:
        True when the job is done, False when it was stopped.

    Raises:
        TrainingFailedError: a failure that would happen again, with its hint.
        ray.train.WorkerGroupError: workers died more often than MAX_WORKER_FAILURES.
    """
    import ray
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    connected()
    for name in assemble.method_of(spec)[0].streams:
        assemble.open_stream(spec.data[name], on_cluster)  # where there is no manifest yet, the cluster makes it once
    (run.path / "fatal.json").unlink(missing_ok=True)
    resources = spec.resources
    trainer = DataParallelTrainer(
        _worker,
        train_loop_config={"spec": spec.model_dump_json(), "run": str(run.path), "home": str(home)},
        scaling_config=ScalingConfig(
            num_workers=resources.workers,  # type: ignore[arg-type]  # a pair is elastic
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker}
            | ({"GPU": resources.gpus_per_worker} if resources.gpus else {}),
        ),
        run_config=RunConfig(
            name=run.path.name,
            storage_path=str(run.path / "ray_train"),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=MAX_WORKER_FAILURES, controller_failure_limit=2, max_preemption_failures=-1
            ),
        ),
    )
    trainer.fit()
    if (run.path / "fatal.json").exists():
        failure = json.loads((run.path / "fatal.json").read_text())
        raise TrainingFailedError(failure["reason"], failure["hint"])
    return checkpoint.latest_step(run.checkpoints) == int(run.total_steps.read_text())


def _worker(config: dict[str, Any]) -> None:
    """What Ray Train runs on each worker."""
    import ray.train

    from workloads.train import train

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    spec = JobSpec.model_validate_json(config["spec"])
    run = RunFolder(Path(config["run"]))
    if (run.path / "fatal.json").exists():  # the group was restarted for a failure that would come again
        return
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    world_size = spec.ranks_among(workers)
    device = torch.device("cpu")
    if spec.resources.gpus:
        device = torch.device("cuda", context.get_local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(spec.resources.cpus_per_worker)
        keep_freed_memory()
    store = _store(rank, workers) if workers > 1 else None
    if rank >= world_size:
        assert store is not None
        _stand_by(store)
        return
    if rank == 0:
        spare = f"; {workers - world_size} stand by, since they do not divide the batch" if workers > world_size else ""
        run.event("workers_joined", f"{world_size} workers train{spare}")
    with run.logging(f"[rank {rank}] "):
        if store is not None and world_size > 1:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        preemption = Preemption(run, rank)
        try:
            train(
                spec,
                run,
                Path(config["home"]),
                Ranks(rank, world_size, device),
                should_stop=run.stop.exists,
                preempted=preemption.noticed,
            )
            if store is not None and workers > world_size:
                preemption.release(store)
        except FINAL as error:
            logger.exception("rank %d failed", rank)
            failure = {"reason": f"{type(error).__name__}: {error}", "hint": getattr(error, "hint", None)}
            write_atomic(run.path / "fatal.json", json.dumps(failure))
            raise
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()


class Preemption:
    """Asks Ray whether a node of the group is about to be taken away: a call that all workers make equally often."""

    def __init__(self, run: RunFolder, rank: int) -> None:
        self._run, self._rank, self._calls, self._known = run, rank, 0, False

    def noticed(self) -> bool:
        import ray.train

        info = ray.train.get_preemption_info()
        self._calls += 1
        if info is not None and not self._known and self._rank == 0:
            self._run.event("preempted", f"a node is about to go: {info}; a checkpoint follows each step")
        self._known = self._known or info is not None
        return self._known

    def release(self, store: Any) -> None:
        """Lets the workers go that stand by: they wait in the call, so all make one more."""
        if self._rank == 0:
            store.set(LAST_CALL, str(self._calls + 1))
        if dist.is_initialized():
            dist.barrier()
        self.noticed()


def _stand_by(store: Any) -> None:
    """What a worker does that is not needed: takes part in the calls of all until the others are done."""
    import ray.train

    calls = 0
    while True:
        ray.train.get_preemption_info()
        calls += 1
        if store.check([LAST_CALL]) and calls >= int(store.get(LAST_CALL)):
            return


def _store(rank: int, workers: int) -> Any:
    """Where the ranks of a group find each other; it listens on Ray's own address only."""
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    address = None
    listener = None
    if rank == 0:
        listener = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=workers)
        address = listener.getsockname()[:2]
    host, port = broadcast_from_rank_zero(address)
    if listener is None:
        return dist.TCPStore(host, port, workers, is_master=False)  # type: ignore[attr-defined]
    master = os.dup(listener.fileno())
    store = dist.TCPStore(host, port, workers, is_master=True, master_listen_fd=master)  # type: ignore[attr-defined]
    listener.close()
    return store
