"""Under Ray Train: a true end, and manifests that the cluster makes; a killed worker is in `tests/faults`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from cluster.embedded import Head
from tests.faults.ray_faults import below
from tests.waiting import until
from workloads.checkpoint_folder import latest_step
from workloads.record import RunFolder
from workloads.run import FAILED, STOPPED, execute
from workloads.spec import JobSpec

pytestmark = pytest.mark.ray


def test_a_failure_that_would_come_again_is_not_tried_again(
    cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    run = RunFolder(tmp_path / "run")
    spec = toy_job(resources={"workers": 2}, optimizer={"lr": 1e30}, schedule={"warmup_epochs": 0})
    assert execute(spec, run, tmp_path, job_id="nan", ray=True) == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and record.hint is not None
    assert "not finite in" in record.reason and "lower optimizer.lr" in record.hint


def test_a_killed_controller_is_replaced_and_ctrl_c_asks_the_workers_for_a_checkpoint(
    cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    import ray

    run = RunFolder(tmp_path / "run")
    resources = {"workers": 2, "cpus_per_worker": 2}  # all there are: the second group needs what the first had
    spec = toy_job(resources=resources, epochs=None, steps=10**6, log_steps=1, checkpoint={"every_steps": 10**6})

    def trains(times: int) -> bool:
        return run.log.exists() and run.log.read_text().count("step 0 of 1000000") == 2 * times and run.metrics.exists()

    def press() -> None:
        try:
            until(lambda: trains(1), "it trains")
            (controller,) = below(psutil.Process(cluster.pid), "TrainController")
            controller.kill()
            until(lambda: trains(2), "it trains again")
        finally:
            signal.raise_signal(signal.SIGINT)

    others = set(ray.util.placement_group_table())
    threading.Thread(target=press).start()
    assert execute(spec, run, tmp_path, job_id="interrupted", ray=True) == STOPPED
    record, step = run.read_record(), latest_step(run.checkpoints)
    assert record is not None and record.state == "STOPPED" and step is not None and 0 < step < 10**6
    left = [event["message"] for event in run.read_events() if event["kind"] == "workers_left"]
    assert "watches over the workers died" in left[0]
    groups = [group for name, group in ray.util.placement_group_table().items() if name not in others]
    assert [group["state"] for group in groups] == ["REMOVED"] * 2


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
