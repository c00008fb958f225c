"""The adapter to Ray Train: one group of workers, each in the same loop as everywhere else.

Checkpoints are ours, so Train only starts, watches and restarts the group. It is used
without its torch backend, whose rendezvous store would listen on every interface: the
process group is made here, on the address that Ray itself uses.
"""

from __future__ import annotations

import gc
import json
import logging
import os
import socket
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workloads import assemble, checkpoint, log_lines
from workloads.data.allocator import keep_freed_memory
from workloads.data.manifest import DataError
from workloads.guards import CollapseError, DivergenceError
from workloads.journal import FailedForGoodError
from workloads.metrics import NonFiniteLossError
from workloads.ranks import Ranks
from workloads.ray_scan import on_cluster
from workloads.record import RunFolder
from workloads.spec import JobSpec

logger = logging.getLogger(__name__)

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
WORKER = "workloads.ray_train:worker"
RESIZE_S = 60.0  # between two looks whether there is room for more workers: a new group costs half a minute
FINAL = (DataError, NonFiniteLossError, DivergenceError, CollapseError, checkpoint.CheckpointError, ValueError)
"""Would happen again."""


class TrainingFailedError(FailedForGoodError):
    """A failure that a worker reported as final."""


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
        TrainingFailedError: a failure that would happen again, or one too many without progress; with its hint.
    """
    import ray
    import ray.train

    from workloads.ray_group import Group, Trainer, call, fatal, free_room, is_at_work

    if not ray.is_initialized():
        ray.init(log_to_driver=False)
    connected()
    for name in assemble.method_of(spec)[0].streams:
        assemble.open_stream(spec.data[name], on_cluster)  # where there is no manifest yet, the cluster makes it once
    fatal(run).unlink(missing_ok=True)
    if is_at_work(run):
        run.event("workers_left", "the process that ran the job was gone, and its workers with it")
    resources = spec.resources
    variables = {name: value for name, value in os.environ.items() if name.startswith(("MLFLOW_", "MANTA_LOG_"))}
    group = Group(run, resources.min_workers)
    trainer = partial(
        Trainer,
        # no train_loop_config, which Ray's dashboard may show: there are passwords among the variables
        partial(call, WORKER, (spec.model_dump_json(), run, home, variables)),
        scaling_config=ray.train.ScalingConfig(
            num_workers=resources.workers,  # type: ignore[arg-type]  # a pair is elastic
            use_gpu=resources.gpus > 0,
            resources_per_worker={"CPU": resources.cpus_per_worker}
            | ({"GPU": resources.gpus_per_worker} if resources.gpus else {})
            | resources.custom_per_worker,
            elastic_resize_monitor_interval_s=RESIZE_S,  # type: ignore[call-arg]
        ),
        run_config=ray.train.RunConfig(
            name=run.path.name,
            storage_path=str(run.path / "ray_train"),
            callbacks=[group],  # type: ignore[list-item]  # typed as those of Tune
            failure_config=ray.train.FailureConfig(  # type: ignore[call-arg]
                max_failures=-1, controller_failure_limit=-1, max_preemption_failures=-1
            ),
        ),
    )
    group.outlive(lambda: trainer().fit(), free_room)
    if fatal(run).exists():
        raise TrainingFailedError(**json.loads(fatal(run).read_text()))
    done = run.total_steps.exists() and checkpoint.latest_step(run.checkpoints) == int(run.total_steps.read_text())
    if is_at_work(run) and not done:
        run.event("workers_left", "all workers stopped, as they were asked to")
    return done


def of_a_lost_worker(error: Exception) -> bool:
    """Whether this may be the echo of another worker's end: parts of a checkpoint are written by collectives.

    Then a RuntimeError is the cause. A full disk can be one too: it comes again until the job is given up.
    """
    return isinstance(error.__cause__, RuntimeError)


def worker(spec_json: str, run: RunFolder, home: Path, variables: dict[str, str]) -> None:
    """What Ray Train runs on each worker."""
    import ray.train
    from ray.train.v2._internal.execution.context import get_train_context

    from workloads.ray_group import give_up
    from workloads.train import train

    os.environ.update(variables)  # else there are only those of the node
    log_lines.from_environment(job_id=os.environ.get("MANTA_JOB_ID", run.path.name))
    spec = JobSpec.model_validate_json(spec_json)
    context = ray.train.get_context()
    rank, workers = context.get_world_rank(), context.get_world_size()
    world_size = spec.ranks_among(workers)
    store = _store(rank, world_size) if world_size > 1 else None
    if rank >= world_size:
        return  # stands by: the process stays until the group ends, and Ray asks it for nothing more
    device = torch.device("cpu")
    if spec.resources.gpus:
        device = torch.device("cuda", context.get_local_rank() % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(spec.resources.cpus_per_worker)
        keep_freed_memory()
    ranks = Ranks(rank, world_size, device)
    if rank == 0:
        spare = f", of which {workers - world_size} stand by: they would not share the batch evenly"
        run.event("workers_joined", f"{workers} workers" + spare * (workers > world_size))
    preemption = get_train_context().preemption_context

    def preempted() -> bool:
        """`ray.train.get_preemption_info` tells the same by a call to an actor in which all workers must take part."""
        return preemption.preemption_info is not None

    with run.logging(f"[rank {rank}] "):
        if store is not None:
            backend = "nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=COLLECTIVE_TIMEOUT)
        try:
            train(spec, run, home, ranks, should_stop=run.stop.exists, preempted=preempted)
        except FINAL as error:
            logger.exception("rank %d failed", rank)
            if not of_a_lost_worker(error):
                give_up(run, f"{type(error).__name__}: {error}", getattr(error, "hint", None))
            raise  # an exchange that failed ends with this process, which Ray ends
        if dist.is_initialized():
            # If DDP held the last reference to gloo, it would join gloo's thread with Python's lock in its hands, for
            # which that thread may be waiting (torch 2.13): so DDP goes first.
            gc.collect()
            dist.destroy_process_group()


def _store(rank: int, world_size: int) -> Any:
    """Where the ranks of a group find each other; it listens on Ray's own address only.

    All workers call it, those that stand by too: for them there is no store.
    """
    import ray.util
    from ray.train.collective import broadcast_from_rank_zero

    address = None
    listener = None
    if rank == 0:
        listener = socket.create_server((ray.util.get_node_ip_address(), 0), backlog=world_size)
        address = listener.getsockname()[:2]
    host, port = broadcast_from_rank_zero(address)
    if rank >= world_size:
        return None
    if listener is None:
        return dist.TCPStore(host, port, world_size, is_master=False)  # type: ignore[attr-defined]
    master = os.dup(listener.fileno())
    store = dist.TCPStore(host, port, world_size, is_master=True, master_listen_fd=master)  # type: ignore[attr-defined]
    listener.close()
    return store
