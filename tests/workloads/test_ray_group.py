"""What Ray Train's controller is told at each change of its state, without Ray Train."""

from __future__ import annotations

import contextlib
import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import ControllerError, PreemptionError, ScalingConfig, WorkerGroupError
from ray.train.v2._internal.exceptions import WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError as Dead
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.scaling_policy import ResizeDecision
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.train.v2.api.preemption import PreemptionInfo

from workloads.checkpoint_folder import CheckpointError, stem
from workloads.ray_group import MAX_FAILURES, MAX_WAIT_S, GivenUpError, Group, Trainer, fatal, give_up, is_at_work
from workloads.record import RunFolder

NOTICE = PreemptionInfo(deadline_ms=None, preempted_node_to_ranks={"a1": [2, 3]})


def died(*, preempted: bool = False) -> WorkerGroupError:
    gone = RayActorError(error_msg="the worker process has died:\n the node is gone", preempted=preempted)
    return WorkerGroupError(
        "[Rank 0]: connection closed by peer",
        {1: Dead("health check", gone), 0: RuntimeError("connection closed by peer")},
    )


class Run:
    """A run whose controller goes from state to state."""

    def __init__(self, folder: Path) -> None:
        self.run = RunFolder(folder)
        self.run.checkpoints.mkdir()
        self.now = 0.0
        self.group = Group(self.run, 2, lambda: self.now)

    def checkpoint(self, step: int) -> None:
        (self.run.checkpoints / "latest").write_text(stem(step))

    def to(self, state: states.TrainControllerState, before: states.TrainControllerState | None = None) -> None:
        self.group.after_controller_state_update(before or states.RunningState(), state)

    def fail(self, error: Exception) -> None:
        self.to(states.RestartingState(error))

    @property
    def events(self) -> list[tuple[str, str]]:
        return [(event["kind"], event["message"]) for event in self.run.read_events()]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def test_the_sixth_failure_in_a_row_ends_the_job_with_a_reason(run: Run) -> None:
    run.checkpoint(40)
    for _ in range(MAX_FAILURES):
        run.fail(died())
        run.checkpoint(40)
    with pytest.raises(GivenUpError):
        run.fail(died())
    told = json.loads(fatal(run.run).read_text())
    assert "rank 0: RuntimeError: connection closed by peer; rank 1: " in told["reason"]
    assert "6 times in a row at step 40, expected at most 5" in told["reason"] and "resume" in told["hint"]


def test_who_left_why_and_from_where_it_goes_on(run: Run) -> None:
    run.run.event("workers_joined", "2 workers")
    assert is_at_work(run.run)
    run.checkpoint(15)
    run.fail(died())
    kind, message = run.events[-1]
    assert kind == "workers_left" and not is_at_work(run.run)
    assert message.endswith("rank 1: RayActorError: the worker process has died:; the next group goes on from step 15")
    assert "connection closed by peer" in run.run.log.read_text()


@given(st.lists(st.sampled_from(["died", "checkpoint", "taken", "preempted", "resized"]), max_size=60))
def test_only_failures_without_a_checkpoint_in_between_count(happened: list[str]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        run, row = Run(Path(folder)), 0
        for step, what in enumerate(happened, start=1):
            if what == "checkpoint":
                run.checkpoint(step)
                row = 0
            elif what == "taken":
                run.fail(died(preempted=True))
            elif what == "preempted":
                run.fail(PreemptionError(NOTICE, drain_timed_out=True))
            elif what == "resized":
                run.to(states.ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1})))
            elif row < MAX_FAILURES:
                row += 1
                run.fail(died())
            else:
                with pytest.raises(GivenUpError):
                    run.fail(died())
                return
        assert not fatal(run.run).exists()
        left = [kind for kind, _ in run.events]
        assert left == ["workers_left"] * len([what for what in happened if what != "checkpoint"])


def test_no_room_is_waited_for_told_once_and_not_for_ever(run: Run) -> None:
    error = ControllerError(WorkerGroupStartupTimeoutError(3))
    for run.now in (0.0, 60.0, MAX_WAIT_S):
        run.to(states.ReschedulingState(error), states.SchedulingState(None))
    assert [kind for kind, _ in run.events] == ["waiting"] and "room for 3 workers" in run.events[0][1]
    run.to(states.RunningState())
    run.now += MAX_WAIT_S
    run.to(states.ReschedulingState(error))
    run.now += MAX_WAIT_S + 1
    with pytest.raises(GivenUpError):
        run.to(states.ReschedulingState(error))
    assert "add nodes" in json.loads(fatal(run.run).read_text())["hint"]


@pytest.mark.parametrize("state", [states.InitializingState(), states.RestartingState(died())])
def test_room_for_fewer_than_the_least_workers_is_no_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, state: states.TrainControllerState
) -> None:
    """An elastic controller that waits goes from a state to the same state, without a pause."""
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    for _ in range(100):
        run.to(state, state)
    assert [kind for kind, _ in run.events] == ["waiting"] and "room for 2 workers" in run.events[0][1]
    assert len(pauses) == 100
    run.run.stop.touch()
    with pytest.raises(GivenUpError):
        run.to(state, state)


def test_a_group_that_failed_late_in_its_start_gives_its_room_back(run: Run) -> None:
    class Started:
        alive = True

        def has_started(self) -> bool:
            return self.alive

        def shutdown(self) -> None:
            self.alive = False

    group = Started()
    run.group.after_worker_group_start(group)
    run.to(states.RunningState(), states.SchedulingState(None))
    assert group.alive
    run.to(states.ShuttingDownState(states.FinishedState()), states.SchedulingState(None))
    assert not group.alive
    run.to(states.ShuttingDownState(states.FinishedState()), states.SchedulingState(None))


def test_a_group_that_dies_while_it_starts_counts(run: Run) -> None:
    error = ControllerError(WorkerGroupStartupFailedError("a worker died"))
    for _ in range(MAX_FAILURES):
        run.to(states.ReschedulingState(error))
    assert "could not be kept: WorkerGroupStartupFailedError: a worker died" in run.events[-1][1]
    with pytest.raises(GivenUpError):
        run.fail(died())


def test_what_a_worker_calls_final_ends_the_run_at_once(run: Run) -> None:
    give_up(run.run, "DataError: no such shard", "look at data.train")
    with pytest.raises(GivenUpError):
        run.fail(died())
    assert json.loads(fatal(run.run).read_text())["reason"] == "DataError: no such shard"


def test_the_hint_of_a_worker_is_kept(run: Run) -> None:
    full = CheckpointError("checkpoint of step 5 could not be written: disk full", "free disk space")
    for _ in range(MAX_FAILURES + 1):
        with contextlib.suppress(GivenUpError):
            run.fail(WorkerGroupError("", {0: full, 1: RuntimeError("Connection closed by peer")}))
    assert json.loads(fatal(run.run).read_text())["hint"] == "free disk space"


def test_a_preemption_notice_is_told_once(run: Run) -> None:
    first = states.PreemptingState(NOTICE, 0.0)
    run.to(first)
    run.to(states.PreemptingState(NOTICE, 0.0), first)
    (kind, message), *more = run.events
    assert kind == "preempted" and "node a1 of rank 2, 3" in message and not more


def test_a_group_that_grows_says_so(run: Run) -> None:
    run.to(states.ResizingState(ResizeDecision(num_workers=3, resources_per_worker={"CPU": 1})))
    assert run.events[0][0] == "workers_left" and "3 workers" in run.events[0][1]


def test_states_in_which_nothing_happens_say_nothing(run: Run) -> None:
    for state in (states.RunningState(), states.ShuttingDownState(states.FinishedState()), states.FinishedState()):
        run.to(state)
    assert run.events == []


def test_a_controller_that_fails_is_started_again(run: Run) -> None:
    """Ray Train does not try again when a worker dies after its actor was made and before it trains."""
    errors: list[Exception] = [ControllerError(RayActorError(error_msg="it died while the group started"))] * 3

    def fit() -> None:
        if errors:
            raise errors.pop()

    run.group.outlive(fit, lambda: None)
    assert not errors and [kind for kind, _ in run.events] == ["workers_left"] * 3


def test_what_a_killed_controller_had_is_taken_back_before_it_is_started_again(run: Run) -> None:
    calls: list[str] = []

    def fit() -> None:
        calls.append("fit")
        if len(calls) < 4:
            raise ActorDiedError

    run.group.outlive(fit, lambda: calls.append("free"))
    assert calls == ["fit", "free", "fit", "free", "fit"]
    assert [kind for kind, _ in run.events] == ["workers_left"] * 2 and "watches over the workers" in run.events[0][1]


def test_but_not_for_ever(run: Run) -> None:
    calls: list[int] = []

    def fit() -> None:
        calls.append(1)
        raise ControllerError(ValueError("no such placement strategy"))

    run.group.outlive(fit, lambda: None)
    assert len(calls) == MAX_FAILURES + 1
    assert "no such placement strategy: 6 times in a row" in json.loads(fatal(run.run).read_text())["reason"]


def test_what_the_controller_gave_up_is_not_started_again(run: Run) -> None:
    def fit() -> None:
        give_up(run.run, "DataError: no such shard", None)
        raise ControllerError(GivenUpError("fatal.json says why"))

    run.group.outlive(fit, lambda: None)
    assert run.events == []


def test_a_run_that_is_asked_to_stop_is_not_started_again(run: Run) -> None:
    def fit() -> None:
        run.run.stop.touch()
        raise ControllerError(GivenUpError("the run was asked to stop"))

    run.group.outlive(fit, lambda: None)
    assert run.events == [] and not fatal(run.run).exists()


def test_workers_start_without_ray_data_and_without_a_cleaner() -> None:
    def of(kind: type[DataParallelTrainer]) -> set[str]:
        trainer = kind(print, scaling_config=ScalingConfig(num_workers=2))
        return {type(callback).__name__ for callback in trainer._create_default_callbacks()}

    assert of(DataParallelTrainer) - of(Trainer) == {"DatasetsCallback", "PlacementGroupCleanerCallback"}
