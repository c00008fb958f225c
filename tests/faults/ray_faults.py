"""Faults of jobs whose workers Ray keeps: a worker dies, or a whole node, or a replica of the service."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import psutil
import torch
import torch.distributed as dist

from cluster.embedded import Head
from service.client import Client
from tests.faults.faults import EVERY, STEPS, Fault
from tests.faults.table import Row
from tests.faults.trial import FORKS, TIMEOUT_S, Trial, Weights, final_weights, same
from tests.waiting import until
from tests.workloads.ray_paced import node
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec

NODE_CPUS = 3  # so many a worker, when nodes are to die: the head has room for one of them


def below(root: psutil.Process, name: str) -> list[psutil.Process]:
    """Processes of this name below another: never those of a cluster beside ours."""
    found = []
    for process in root.children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            if name in " ".join(process.cmdline()[:2]):
                found.append(process)
    return found


def started_again(times: int) -> Callable[[Trial], None]:
    def check(trial: Trial) -> None:
        assert trial.run.log.read_text().count("rank 1 of 2") == times + 1, "the fault had no effect, or too much"

    return check


def worker_killed(head: Head, times: int = 1, look: Callable[[], None] = lambda: None) -> Fault:
    """One worker of the group, of any rank, is killed so many times; `look` is called while it stands still for it."""

    def inject(trial: Trial, rng: random.Random) -> int:
        trial.start()
        assert trial.spec.steps is not None
        for _ in range(times):
            trial.after(rng.randrange(1, trial.spec.steps // (times + 1)), rng)
            victim = rng.choice(below(psutil.Process(head.pid), "RayTrainWorker"))
            victim.suspend()  # the group waits for it: a look takes longer than the job on a busy machine
            look()
            victim.kill()
        return times

    return Fault("worker SIGKILL", inject, 2 * EVERY, started_again(times))


def controller_killed(head: Head) -> Fault:
    """The process that watches over the workers is killed, and they go with it."""

    def inject(trial: Trial, rng: random.Random) -> int:
        trial.start()
        assert trial.spec.steps is not None
        trial.after(rng.randrange(1, trial.spec.steps // 2), rng)
        (controller,) = below(psutil.Process(head.pid), "TrainController")
        controller.kill()
        return 1

    return Fault("controller SIGKILL", inject, 2 * EVERY, started_again(1))


@contextlib.contextmanager
def node_killed(head: Head, folder: Path) -> Iterator[Fault]:
    """The raylet of a node and its worker are killed; another node has room for that worker."""
    with contextlib.ExitStack() as stack:
        nodes = []
        for name in ("one", "two"):
            (folder / name).mkdir(parents=True)
            nodes.append(stack.enter_context(node(head, folder / name, num_cpus=NODE_CPUS)))

        def inject(trial: Trial, rng: random.Random) -> int:
            trial.start()
            assert trial.spec.steps is not None
            trial.after(rng.randrange(1, trial.spec.steps // 2), rng)
            victim, worker = rng.choice([(one, found[0]) for one in nodes if (found := below(one, "RayTrainWorker"))])
            worker.suspend()  # a worker notices within a second that its raylet is dead: the job could end before
            (raylet,) = below(victim, "raylet/raylet")
            raylet.kill()
            worker.kill()
            return 1

        yield Fault("node SIGKILL", inject, 2 * EVERY, started_again(1))


def replica_killed(head: Head, spec: JobSpec, rng: random.Random, expected: Weights) -> Row:
    """A replica of the service is killed while a job runs, which hears nothing of it.

    Raises:
        AssertionError: the service did not come back, or the job was done twice, or not at all.
    """
    assert spec.log_steps == 1, "each step is a line of the curve, so that those made twice can be counted"
    with Client(head.url) as client:
        job_id = client.submit(spec.model_dump(mode="json"))["id"]
        run = RunFolder(head.home / "runs" / job_id)
        moment = rng.randrange(1, STEPS)
        until(lambda: run.metrics.exists() and run.metrics.read_text().count("\n") >= moment, "it trains")
        record = run.read_record()
        assert record is not None and record.state in ("STARTING", "RUNNING"), "the job ended before the fault"
        rng.choice(below(psutil.Process(head.pid), "ServeReplica")).kill()
        until(lambda: _answers(head), "the service is back")
        job = client.wait(job_id)
        assert (job["state"], job["reason"], job["attempt"]) == ("SUCCEEDED", None, 1)
        assert [other["id"] for other in client.jobs()].count(job_id) == 1
    lost = run.metrics.read_text().count("\n") - len(list(run.read_metrics()))
    row = Row("service replica SIGKILL", 1, True, lost, same(expected, final_weights(run)))
    assert row.equal and lost == 0, row
    return row


def _answers(head: Head) -> bool:
    with contextlib.suppress(httpx.TransportError):
        return httpx.get(f"{head.url}/readyz", timeout=5, trust_env=False).status_code == 200
    return False


def _rank(spec: str, folder: Path, home: Path, rank: int, world_size: int) -> None:
    from workloads.train import train

    job = JobSpec.model_validate_json(spec)
    torch.set_num_threads(job.resources.cpus_per_worker)  # sums of more threads round otherwise
    store = dist.FileStore(str(folder / "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size)
    train(job, RunFolder(folder / "run"), home, Ranks(rank, world_size))
    dist.destroy_process_group()


def uninterrupted_ranks(spec: JobSpec, folder: Path, home: Path | None = None) -> Weights:
    """The weights that as many ranks as the job has workers end with, without Ray, when nothing happens.

    Args:
        spec: the job.
        folder: a new one.
        home: where its teachers are, if it has any.
    """
    folder.mkdir(parents=True)
    n = spec.resources.max_workers
    ranks = [
        FORKS.Process(target=_rank, args=(spec.model_dump_json(), folder, home or folder, rank, n)) for rank in range(n)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_S)
        assert process.exitcode == 0
    return final_weights(RunFolder(folder / "run"))
