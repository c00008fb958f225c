"""A node that is about to go, workers that hang, workers that die again and again."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from cluster.embedded import Head
from tests.toy import difference
from tests.waiting import until
from tests.workloads.ray_paced import DiesOnArrival, beside, end_node, node, notes, one_process, orders
from workloads import agreement, checkpoint, ray_group, ray_train
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.run import FAILED, SUCCEEDED, execute
from workloads.spec import JobSpec
from workloads.spec_training import CheckpointPolicy
from workloads.step import Stepper

Make = Callable[..., JobSpec]
NOTICE, DEATH = 7, 12


def told(run: RunFolder, kind: str) -> list[str]:
    return [event["message"] for event in run.read_events() if event["kind"] == kind]


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    return torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]


def _rank(rank: int, spec: str, folder: Path) -> None:
    from workloads.train import train

    torch.set_num_threads(1)
    agreement.POLL_S = 0.0  # ask after each step until the notice
    store = dist.FileStore(str(folder / "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    run, ranks, step, made = RunFolder(folder / "run"), Ranks(rank, 2), Stepper.__call__, [0]

    def dies(self: Stepper, streams: Any, progress: Any) -> Any:
        made[0] = progress.step + 1
        if made[0] == DEATH:  # its node is gone before this step is done
            os._exit(9)
        return step(self, streams, progress)

    Stepper.__call__ = dies  # type: ignore[method-assign]
    train(
        JobSpec.model_validate_json(spec),
        run,
        folder,
        ranks,
        preempted=lambda: rank == 1 and made[0] >= NOTICE,  # only one of them was told
    )


def test_after_a_notice_at_most_one_step_is_lost(toy_job: Make, tmp_path: Path) -> None:
    spec = toy_job(checkpoint={"every_steps": 1000}, resources={"workers": 2})
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=_rank, args=(rank, spec.model_dump_json(), tmp_path)) for rank in range(2)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(60)
    assert [process.exitcode for process in ranks] == [9, 9]
    latest = checkpoint.latest_step(RunFolder(tmp_path / "run").checkpoints)
    assert latest is not None and DEATH - 1 - latest <= 1  # 11 steps were done


@pytest.mark.parametrize(("cause", "final"), [(OSError("disk full"), True), (RuntimeError("Connection reset"), False)])
def test_a_worker_lost_while_parts_are_written_does_not_end_the_job(
    tmp_path: Path, cause: Exception, final: bool
) -> None:
    def fail() -> None:
        raise cause

    checkpoints = checkpoint.Checkpoints(tmp_path, CheckpointPolicy(), Ranks())
    with pytest.raises(checkpoint.CheckpointError) as caught:
        checkpoints._write(5, fail, None, False)
    assert ray_train.of_a_lost_worker(caught.value) is not final


@pytest.mark.ray
@pytest.mark.soak
def test_a_drained_node_costs_at_most_one_step(
    cluster: Head, toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cloud does it: a notice, a deadline, and then the node is gone."""
    import ray

    monkeypatch.setenv("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "1")
    monkeypatch.setenv("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "0.5")
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")  # Ray may count the dead node for 20 s more
    monkeypatch.setattr(ray_train, "WORKER", "tests.workloads.ray_paced:paced")
    monkeypatch.setattr(ray_train, "RESIZE_S", 1000.0)
    spec = toy_job(
        batch_size=12,
        micro_batch_size=2,
        resources={"workers": [2, 3], "cpus_per_worker": 2},
        epochs=None,
        steps=150,
        log_steps=1,
        checkpoint={"every_steps": 1000},
    )
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    (run.path / "pace").write_text("0.2")
    done: list[int] = []
    with node(cluster, tmp_path, "spot") as spot:
        (spot_id,) = (one["NodeID"] for one in ray.nodes() if one["Alive"] and "spot" in one["Resources"])

        def preempt() -> None:
            until(lambda: any(len(process) > 10 for process in notes(run)))
            drain = [sys.executable, "-m", "ray.scripts.scripts", "drain-node", "--address", cluster.address]
            drain += ["--node-id", spot_id, "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot"]
            subprocess.run([*drain, "--deadline-remaining-seconds", "12"], check=True, capture_output=True)
            deadline = time.monotonic() + 10
            until(lambda: told(run, "preempted"))
            until(lambda: checkpoint.latest_step(run.checkpoints))
            time.sleep(max(0.0, deadline - time.monotonic()))
            end_node(spot)
            until(lambda: told(run, "workers_left"))
            done.append(max(process[-1]["step"] for process in notes(run)))
            (run.path / "pace").unlink()

        with beside(preempt):
            assert execute(spec, run, tmp_path, job_id="preempted", ray=True) == SUCCEEDED
    assert told(run, "workers_joined") == ["3 workers", "2 workers"]
    (left,) = told(run, "workers_left")
    assert 0 <= done[0] - int(left.rsplit(" ", 1)[1]) <= 1
    alone = RunFolder(tmp_path / "alone")
    order = one_process(spec, alone, monkeypatch)
    assert all(batch == order[step - 1] for step, batches in orders(run).items() for batch in batches)
    assert difference(final_weights(alone), final_weights(run)) < 5e-4  # 150 steps


@pytest.mark.ray
@pytest.mark.soak
def test_a_worker_that_hangs_is_told_of_and_started_again(
    cluster: Head, toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "WORKER", "tests.workloads.ray_paced:hangs_once")
    spec = toy_job(resources={"workers": 2}, guards={"hang": 4})
    run = RunFolder(tmp_path / "run")
    assert execute(spec, run, tmp_path, job_id="hangs", ray=True) == SUCCEEDED
    assert len(told(run, "workers_joined")) == 2
    (left,) = told(run, "workers_left")
    assert left.endswith("goes on from step 5")
    stacks = [(run.path / f"stacks-rank{rank}.txt").read_text() for rank in range(2)]
    assert "workloads/step.py" in stacks[0]  # waits for the other
    assert "in stuck" in stacks[1] and "workloads/step.py" not in stacks[1]
    hangs = told(run, "hang")
    assert sorted(message.split(" made no step")[0] for message in hangs) == ["rank 0", "rank 1"]


@pytest.mark.ray
@pytest.mark.soak
def test_workers_that_only_die_end_the_job_with_a_reason(
    cluster: Head, toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ray_train, "WORKER", "tests.workloads.ray_paced:dies_early")
    run = RunFolder(tmp_path / "run")
    assert execute(toy_job(resources={"workers": 2}), run, tmp_path, job_id="dies", ray=True) == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and record.hint is not None
    assert "6 times in a row at step 0" in record.reason and "resume" in record.hint
    assert 6 <= len((run.path / "deaths").read_text()) <= 12


@pytest.mark.ray
@pytest.mark.soak
def test_workers_that_die_while_the_group_starts_cost_the_job_neither_life_nor_room(
    cluster: Head, toy_job: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """4 of 4 CPUs are asked for: were a group that failed not cleared away, there would be no room for another."""
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(ray_group, "call", DiesOnArrival(run, 3))
    spec = toy_job(resources={"workers": 2, "cpus_per_worker": 2})
    assert execute(spec, run, tmp_path, job_id="arrives", ray=True) == SUCCEEDED
    assert told(run, "workers_left") and not told(run, "waiting")
    assert all("the group could not be kept" in message for message in told(run, "workers_left"))
