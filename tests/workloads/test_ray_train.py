"""Two workers under Ray Train: the same numbers as one process, a killed worker, a true end."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import torch

from cluster.doctor import listening
from cluster.embedded import Head
from tests.toy import difference
from workloads import checkpoint
from workloads.record import RunFolder
from workloads.run import FAILED, SUCCEEDED, execute
from workloads.spec import JobSpec

pytestmark = pytest.mark.ray


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    return torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]


def kill_a_worker(run: RunFolder, head: Head, killed: list[int], open_to_all: list[tuple[str, str, int]]) -> None:
    """Once there is a checkpoint: lists sockets that others can reach, then kills one worker of the group."""
    deadline = time.monotonic() + 90
    while time.monotonic() < deadline:
        if checkpoint.latest_step(run.checkpoints):
            open_to_all += listening(head.pid)
            for process in psutil.process_iter(["cmdline"]):
                words = process.info["cmdline"] or []
                if any("RayTrainWorker" in word for word in words):
                    killed.append(process.pid)
                    os.kill(process.pid, signal.SIGKILL)
                    return
        time.sleep(0.02)


def test_two_workers_one_killed_end_with_the_weights_of_one_process(
    cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    spec = toy_job(resources={"workers": 2}, epochs=30)  # 300 steps
    alone, group = RunFolder(tmp_path / "alone"), RunFolder(tmp_path / "group")
    assert execute(spec, alone, tmp_path, job_id="alone") == SUCCEEDED
    killed: list[int] = []
    open_to_all: list[tuple[str, str, int]] = []
    thread = threading.Thread(target=kill_a_worker, args=(group, cluster, killed, open_to_all))
    thread.start()
    assert execute(spec, group, tmp_path, job_id="group", ray=True) == SUCCEEDED
    thread.join()
    assert killed
    assert open_to_all == []  # torch's store and gloo too are on loopback
    assert group.log.read_text().count("rank 1 of 2") == 2  # started, and started again
    record = group.read_record()
    assert record is not None and (record.state, record.step, record.total_steps) == ("SUCCEEDED", 300, 300)
    expected, got = final_weights(alone), final_weights(group)
    assert difference(expected, got) < 2e-3  # sums over ranks round otherwise; 300 AdamW steps carry it on
    assert json.loads((group.artifact / "manta.json").read_text())["job_id"] == "group"


def test_a_failure_that_would_come_again_is_not_tried_again(
    cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    spec = toy_job(resources={"workers": 2}, optimizer={"lr": 1e30}, schedule={"warmup_epochs": 0})
    assert execute(spec, run, tmp_path, job_id="nan", ray=True) == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and record.hint is not None
    assert "not finite in" in record.reason and "lower optimizer.lr" in record.hint


def test_the_cluster_makes_the_manifest_that_one_process_makes(cluster: Head, tmp_path: Path) -> None:
    from tests.toy import write_shards
    from workloads.data.indexing import build_manifest
    from workloads.ray_scan import on_cluster

    pattern = write_shards(tmp_path, "many", 60, 20)
    made, alone = build_manifest(pattern, mapper=on_cluster), build_manifest(pattern)
    assert made.content_hash == alone.content_hash and (made.label == alone.label).all() and len(made) == 60
    assert [made.keys[i] for i in range(60)] == [alone.keys[i] for i in range(60)]


def test_a_scan_on_the_cluster_fails_as_it_does_here(cluster: Head, tmp_path: Path) -> None:
    from workloads.data.tarscan import scan
    from workloads.ray_scan import on_cluster

    with pytest.raises(FileNotFoundError, match=r"gone\.tar"):
        list(on_cluster(scan, [str(tmp_path / "gone.tar")], None))
