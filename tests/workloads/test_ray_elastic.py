"""Groups that grow, shrink and start again compute what one process computes."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from cluster.embedded import Head
from tests.toy import difference
from tests.waiting import until
from tests.workloads.ray_paced import beside, end_node, hold, node, notes, one_process, orders
from workloads import checkpoint, ray_train
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, execute
from workloads.spec import JobSpec

pytestmark = pytest.mark.ray
STEPS = 30
Make = Callable[..., JobSpec]


@pytest.fixture
def elastic(toy_job: Make, monkeypatch: pytest.MonkeyPatch) -> JobSpec:
    """1 to 3 workers of 2 CPUs, of which the cluster has room for 2; 30 steps on 3 micro-batches of 4."""
    monkeypatch.setattr(ray_train, "RESIZE_S", 1.0)
    monkeypatch.setattr(ray_train, "WORKER", "tests.workloads.ray_paced:paced")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "toys")
    resources = {"workers": [1, 3], "cpus_per_worker": 2}
    return toy_job(batch_size=12, resources=resources, epochs=None, steps=STEPS, log_steps=1)


def final_weights(run: RunFolder) -> dict[str, torch.Tensor]:
    step = checkpoint.latest_step(run.checkpoints)
    return torch.load(run.checkpoints / f"step-{step:08d}.pt", weights_only=True)["method"]


def told(run: RunFolder, kind: str) -> list[str]:
    return [event["message"] for event in run.read_events() if event["kind"] == kind]


def same_as_one_process(spec: JobSpec, run: RunFolder, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The samples of each step, the schedule, the curve and the weights."""
    alone = RunFolder(folder / "alone")
    order = one_process(spec, alone, monkeypatch)
    seen = orders(run)
    assert sorted(seen) == list(range(1, STEPS + 1))
    assert all(batch == order[step - 1] for step, batches in seen.items() for batch in batches)
    curve, expected = list(run.read_metrics()), list(alone.read_metrics())
    assert [(point["step"], point["lr"]) for point in curve] == [(point["step"], point["lr"]) for point in expected]
    assert [point["loss"] for point in curve] == pytest.approx([point["loss"] for point in expected], rel=1e-4)
    assert difference(final_weights(alone), final_weights(run)) < 5e-5


def test_a_group_starts_with_the_workers_there_is_room_for_and_grows(
    cluster: Head, elastic: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = RunFolder(tmp_path / "run")

    def grow() -> None:
        with hold(run, 8):
            until(lambda: checkpoint.latest_step(run.checkpoints) == 5)
            node_joins.enter_context(node(cluster, tmp_path))
            until(lambda: len(told(run, "workers_joined")) == 2)

    with contextlib.ExitStack() as node_joins, beside(grow):
        assert execute(elastic, run, tmp_path, job_id="elastic", ray=True) == SUCCEEDED
    first, second = told(run, "workers_joined")
    assert first == "2 workers, of which 1 stand by: they would not share the batch evenly" and second == "3 workers"
    (left,) = told(run, "workers_left")
    assert "with 3 workers" in left and left.endswith("goes on from step 5")
    same_as_one_process(elastic, run, tmp_path, monkeypatch)
    assert {note["mlflow"] for process in notes(run) for note in process} == {"toys"}


@pytest.mark.soak
def test_a_group_goes_on_with_those_that_are_left_when_a_node_dies(
    cluster: Head, elastic: JobSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "30")  # Ray may count the dead node for 20 s more
    run = RunFolder(tmp_path / "run")

    def shrink() -> None:
        with hold(run, 18):
            until(lambda: checkpoint.latest_step(run.checkpoints) == 15)
            end_node(other)
            until(lambda: len(told(run, "workers_joined")) == 2)

    with node(cluster, tmp_path) as other, beside(shrink):
        assert execute(elastic, run, tmp_path, job_id="shrinks", ray=True) == SUCCEEDED
    first, second = told(run, "workers_joined")
    assert first == "3 workers" and second.startswith("2 workers, of which 1 stand by")
    assert told(run, "workers_left")[0].endswith("goes on from step 15")
    same_as_one_process(elastic, run, tmp_path, monkeypatch)
