"""Searches as trials of Ray Tune: over actors, in islands, killed in every part, stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest

from cluster.embedded import Head
from tests.toy_search import kept, toy_search
from tests.waiting import until
from workloads.explore import IslandFile
from workloads.record import RunFolder
from workloads.run import FAILED, STOPPED, SUCCEEDED, execute
from workloads.winner import read_found

pytestmark = pytest.mark.ray
LONG = {"iterations": 3000, "population": 16, "batch_size": 8, "image_size": 16}


def told(run: RunFolder, island: int = 0) -> int:
    return (IslandFile(run, island).read() or {"told": 0})["told"]


def processes(head: Head, name: str) -> list[psutil.Process]:
    """Of this cluster's workers, those that run this now, or hold such an actor."""
    found = []
    for process in psutil.Process(head.pid).children(recursive=True):
        try:
            if process.cmdline()[:1] and process.cmdline()[0].startswith(f"ray::{name}"):
                found.append(process)
        except psutil.Error:
            continue
    return found


@contextmanager
def meanwhile(action: Callable[[], None]) -> Iterator[None]:
    """Does something beside what the block does; its error is the test's."""
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(action)
        yield
        done.result()


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the long search finds when nothing happens to it."""
    run = RunFolder(tmp_path_factory.mktemp("long"))
    assert execute(toy_search(LONG), run, run.path, job_id="a") == SUCCEEDED
    return kept(run)


def test_two_actors_find_what_one_process_finds_though_one_dies_and_the_island_too(
    cluster: Head, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")

    def kill() -> None:
        until(lambda: told(run) > 1)
        until(lambda: processes(cluster, "Scorer"))[0].kill()
        before = told(run) + 100  # so the actor is there again
        until(lambda: told(run) > before)
        until(lambda: processes(cluster, "ImplicitFunc"))[0].kill()

    with meanwhile(kill):
        assert execute(toy_search(LONG, resources={"workers": 2}), run, tmp_path, job_id="a", ray=True) == SUCCEEDED
    assert kept(run) == expected
    record, points = run.read_record(), list(run.read_metrics())
    assert record is not None and (record.step, record.total_steps) == (LONG["iterations"],) * 2
    assert points[-1]["step"] == LONG["iterations"]
    assert not (run.path / "tune").exists()


def test_islands_are_trials_of_their_own(cluster: Head, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    spec = toy_search(resources={"workers": 2}, islands=2, migrate_every=40)
    assert execute(spec, run, tmp_path, job_id="a", ray=True) == SUCCEEDED
    found = read_found(run.artifact)
    assert found is not None and found.told == 240
    assert [told(run, n) for n in range(2)] == [120, 120]


def test_a_driver_that_dies_is_restored_and_one_that_is_stopped_goes_on(
    cluster: Head, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    run, spec = RunFolder(tmp_path / "runs" / "a"), toy_search(LONG)
    (tmp_path / "job.yaml").write_text(spec.model_dump_json())
    environment = {**os.environ, "MANTA_HOME": str(tmp_path), "MANTA_JOB_ID": "a"}
    command = [sys.executable, "-m", "workloads.run", str(tmp_path / "job.yaml")]
    with open(tmp_path / "out.txt", "wb") as out:
        driver = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
        until(lambda: told(run) > 100)
        driver.kill()
        driver.wait()
        until(lambda: not processes(cluster, "ImplicitFunc"))  # Ray ends what the driver began
        before = told(run)
        again = subprocess.Popen(command, env=environment | {"MANTA_ATTEMPT": "2"}, stdout=out, stderr=out)
        until(lambda: told(run) > before)
        again.send_signal(signal.SIGTERM)
        assert again.wait(60) == STOPPED
        assert "search_restored" in [event["kind"] for event in run.read_events()]
        assert before < told(run) < LONG["iterations"]
    run.stop.unlink()
    assert execute(spec, run, tmp_path, job_id="a", attempt=3, ray=True) == SUCCEEDED
    assert kept(run) == expected


def test_what_would_fail_again_fails_once(cluster: Head, tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    impossible = toy_search({"budget": {"latency": {"ms": 1e-9}}})  # only measuring tells
    assert execute(impossible, run, tmp_path, job_id="a", ray=True) == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None
    assert "got latency: 1e-09 ms, expected more than" in record.reason
