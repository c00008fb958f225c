"""A worker of Ray Train whose steps are written down and can be held, and nodes that come and go.

Imported by the workers too.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from cluster import embedded
from cluster.embedded import Head
from tests.waiting import until
from workloads import ray_group, ray_train, watchdog
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.step import Stepper
from workloads.train import train

_step = Stepper.__call__


@contextlib.contextmanager
def hold(run: RunFolder, step: int) -> Iterator[None]:
    """Within, the job does not make this step."""
    run.path.mkdir(parents=True, exist_ok=True)
    (run.path / f"hold-{step}").touch()
    try:
        yield
    finally:
        (run.path / f"hold-{step}").unlink(missing_ok=True)


@contextlib.contextmanager
def beside(what: Callable[[], None]) -> Iterator[None]:
    """Within, `what` runs in a thread."""
    with ThreadPoolExecutor(1) as thread:
        done = thread.submit(what)
        yield
        done.result()


def paced(spec_json: str, run: RunFolder, home: Path, variables: dict[str, str]) -> None:
    """`ray_train.worker`; before a step of 1, 2, ... it waits while the file `hold-<step>` is in the run folder."""
    name = f"order-{os.getpid()}.jsonl"

    def step(self: Stepper, streams: Any, progress: Any) -> Any:
        number = progress.step + 1
        while (run.path / f"hold-{number}").exists():
            time.sleep(0.02)
        if (pace := run.path / "pace").exists():
            time.sleep(float(pace.read_text()))
        done = _step(self, streams, progress)
        note = {"step": number, "index": streams["train"]["index"].tolist(), "ranks": str(self._ranks)}
        note |= {"rank": self._ranks.rank, "mlflow": os.environ.get("MLFLOW_EXPERIMENT_NAME")}
        with open(run.path / name, "a") as file:
            file.write(json.dumps(note) + "\n")
        return done

    Stepper.__call__ = step  # type: ignore[method-assign]
    ray_train.worker(spec_json, run, home, variables)


def hangs_once(spec_json: str, run: RunFolder, home: Path, variables: dict[str, str]) -> None:
    """Rank 1 stands still in its eighth step, the first time."""
    watchdog.GRACE_S = 3.0
    step = Stepper.__call__

    def stuck(self: Stepper, streams: Any, progress: Any) -> Any:
        flag = run.path / "hung"
        if self._ranks.rank == 1 and progress.step == 7 and not flag.exists():
            flag.touch()
            time.sleep(1000)
        return step(self, streams, progress)

    Stepper.__call__ = stuck  # type: ignore[method-assign]
    ray_train.worker(spec_json, run, home, variables)


def dies_early(spec_json: str, run: RunFolder, home: Path, variables: dict[str, str]) -> None:
    with open(run.path / "deaths", "a") as file:
        file.write(".")
    time.sleep(0.5)
    os._exit(1)


class DiesOnArrival:
    """Ends, a few times, the worker that unpickles it, which happens late in the start of a group."""

    def __init__(self, run: RunFolder, times: int) -> None:
        self._run, self._times = run, times

    def __call__(self, function: str, args: tuple[Any, ...]) -> None:
        raise AssertionError("is replaced on its way")

    def __reduce__(self) -> Any:
        return arrive, (self._run, self._times)


def arrive(run: RunFolder, times: int) -> Any:
    deaths = run.path / "deaths"
    if not deaths.exists() or len(deaths.read_text()) < times:
        with open(deaths, "a") as file:
            file.write(".")
        os._exit(1)
    return ray_group.call


def notes(run: RunFolder) -> list[list[dict[str, Any]]]:
    """What each process wrote, whole lines only."""
    files = [path.read_text() for path in run.path.glob("order-*.jsonl")]
    return [[json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()] for text in files]


def orders(run: RunFolder) -> dict[int, list[list[int]]]:
    """By step: the samples of the batch, by rank, each time that all ranks of a group made the step."""
    found: dict[int, list[list[int]]] = {}
    by_world: dict[tuple[int, int], dict[int, list[int]]] = {}
    for process in notes(run):
        for note in process:
            world = int(note["ranks"].split("world_size=")[1].split(",")[0])
            shares = by_world.setdefault((note["step"], world), {})
            shares[note["rank"]] = note["index"]
            if len(shares) == world:
                found.setdefault(note["step"], []).append([i for rank in range(world) for i in shares[rank]])
    return found


def one_process(spec: JobSpec, run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Trains as one process does -> the samples of each step."""
    order: list[list[int]] = []

    def step(self: Stepper, streams: Any, progress: Any) -> Any:
        order.append(streams["train"]["index"].tolist())
        return _step(self, streams, progress)

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(Stepper, "__call__", step)
            assert train(spec, run, run.path)
    finally:
        torch.set_num_threads(before)
    return order


NODE = """
import json, sys, time
from ray._private.node import Node
from ray._private.parameter import RayParams
address, cpus, resources = sys.argv[1:]
ports = dict(min_worker_port=0, max_worker_port=0, node_manager_port=0, dashboard_agent_listen_port=None)
params = dict(node_ip_address="127.0.0.1", include_log_monitor=False, object_store_memory=100 << 20, **ports)
Node(RayParams(gcs_address=address, num_cpus=int(cpus), resources=json.loads(resources), **params), head=False)
print("ready", flush=True)
time.sleep(3600)
"""  # `ray start` refuses a second node on loopback


@contextlib.contextmanager
def node(head: Head, folder: Path, *resources: str, num_cpus: int = 2) -> Iterator[psutil.Process]:
    """A second node of the cluster on this machine; `end_node` ends it before its time."""
    log = folder / "node.log"
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", NODE, head.address, str(num_cpus), json.dumps(dict.fromkeys(resources, 1))],
            env=os.environ | embedded.environment(head),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        until(lambda: "ready" in log.read_text() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        yield psutil.Process(process.pid)
    finally:
        end_node(psutil.Process(process.pid))
        process.wait()


def end_node(process: psutil.Process) -> None:
    """All of its processes at once, as when the power goes."""
    with contextlib.suppress(psutil.NoSuchProcess):
        family: Sequence[psutil.Process] = [process, *process.children(recursive=True)]
        for one in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
