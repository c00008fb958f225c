"""What becomes of a group of workers under Ray Train: who left and why, and when the job is given up.

Ray Train starts a group again whatever ended it, and counts failures over the whole life of
a run: a job of weeks would end by its sixth lost worker, however far it came in between. So
Ray is told to go on for ever, and here only failures in a row count, those without a new
checkpoint in between.

No torch in here: the actor that Ray Train's controller is would import it for nothing.
"""

from __future__ import annotations

import importlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from textwrap import shorten
from typing import Any

import ray
from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.exceptions import ActorDiedError, RayActorError
from ray.train import PreemptionError, Result, TrainingFailedError, WorkerGroupError
from ray.train.v2._internal.callbacks.datasets import DatasetsCallback
from ray.train.v2._internal.callbacks.placement_group_callback import PlacementGroupCleanerCallback
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback, WorkerGroupCallback
from ray.train.v2._internal.execution.context import TrainRunContext
from ray.train.v2._internal.execution.controller import state as states
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy, ResizeDecision
from ray.train.v2._internal.execution.worker_group import WorkerGroup
from ray.train.v2.api.callback import RayTrainCallback
from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer
from ray.util.placement_group import PlacementGroup, remove_placement_group
from ray.util.state import list_placement_groups

from workloads.checkpoint_folder import latest_step
from workloads.record import RunFolder, write_atomic

logger = logging.getLogger(__name__)

MAX_FAILURES = 5  # in a row without a new checkpoint; one more ends the job
MAX_WAIT_S = 3600.0  # for nodes that have room
LOOK_S = 0.5  # while there is none
_CHARACTERS = 150  # of what one worker said; gloo's sentences are long
_ROOM = "ask for fewer workers, or [least, most], or add nodes; then resume the job"
_AGAIN = (
    "see log.txt; the last checkpoint is kept: mend what ends the workers, then resume the job; a worker killed for "
    "memory leaves no trace of its own: try a smaller micro_batch_size"
)


class GivenUpError(RuntimeError):
    """Ends Ray Train's controller; `fatal.json` has the reason, unless the run was asked to stop."""


def fatal(run: RunFolder) -> Path:
    """Appears when the job must not be tried again: `reason` and `hint`."""
    return run.path / "fatal.json"


def give_up(run: RunFolder, reason: str, hint: str | None) -> None:
    write_atomic(fatal(run), json.dumps({"reason": reason, "hint": hint}))


def free_room() -> None:
    """Removes the placement groups of this driver, which Ray keeps until it ends; their workers end with them."""
    mine = ("creator_job_id", "=", ray.get_runtime_context().get_job_id())
    for group in list_placement_groups(filters=[mine, ("state", "!=", "REMOVED")]):
        remove_placement_group(PlacementGroup(PlacementGroupID(bytes.fromhex(group.placement_group_id))))


def is_at_work(run: RunFolder) -> bool:
    """Whether a group joined and nobody has told that it left."""
    kinds = [event["kind"] for event in run.read_events() if event["kind"] in ("workers_joined", "workers_left")]
    return kinds[-1:] == ["workers_joined"]


def call(function: str, args: tuple[Any, ...]) -> None:
    """Calls `module:function` with `args`, imported here, in the thread that trains.

    Ray Train unpickles what it is to run while the group starts, when a worker that dies ends the run: seconds, were
    torch imported by then.
    """
    module, _, name = function.partition(":")
    getattr(importlib.import_module(module), name)(*args)


class OwnRoom(FixedScalingPolicy):
    """Asks for room by the placement group alone, which the autoscaler of a cluster sees too.

    Ray's own asks an actor as well, which shares a cluster out between Ray Data and Ray Train. Each actor takes 1 % of
    a core for as long as the cluster is there, since its main thread looks for signals 100 times a second.
    """

    def after_controller_start(self, train_run_context: TrainRunContext) -> None:
        """Starts no such actor."""

    def _maybe_send_resource_request(self) -> None:
        """Asks none."""


class Trainer(DataParallelTrainer):
    """Ray's, without what a run of ours has no use for; two workers on two cores make 3 % more steps a second so."""

    def _register_sigint_handler(self, controller: ActorHandle[Any]) -> None:
        """Leaves Ctrl-C to the run, which asks the workers for a checkpoint: this would end them at once."""

    def _create_default_callbacks(self) -> list[RayTrainCallback]:
        """Without Ray Data, which every worker would import, beside an actor for it in a process of its own.

        And without the actor that asks once a second whether the controller lives: see `Group.outlive`.
        """
        left_out = (DatasetsCallback, PlacementGroupCleanerCallback)
        return [one for one in super()._create_default_callbacks() if not isinstance(one, left_out)]

    def _initialize_and_run_controller(self, **arguments: Any) -> Result:
        policy = arguments["scaling_policy"]
        if isinstance(policy, FixedScalingPolicy):
            arguments["scaling_policy"] = OwnRoom(policy.scaling_config)
        return super()._initialize_and_run_controller(**arguments)


class Group(ControllerCallback, WorkerGroupCallback):
    """Lives in Ray Train's controller, which calls it at each turn of its loop."""

    def __init__(self, run: RunFolder, min_workers: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._run, self._min_workers, self._clock = run, min_workers, clock
        self._failures = 0
        self._step = latest_step(run.checkpoints)
        self._waits_since: float | None = None
        self._started: WorkerGroup | None = None

    def outlive(self, fit: Callable[[], object], free_room: Callable[[], None]) -> None:
        """Calls `fit`, again when Ray Train's controller itself fails or is killed, until it returns or the job ends.

        For the controller a worker that dies is a failure to try again after, but for a moment of the start of a group.

        Args:
            fit: starts a controller, and returns when it is done.
            free_room: takes back what a controller had that was killed.
        """
        while not self._ends():
            try:
                fit()
                return
            except TrainingFailedError as error:
                if not self._ends():
                    self._failed(error)
            except ActorDiedError as error:
                free_room()
                if not self._ends():
                    self._failed(error)

    def after_worker_group_start(self, worker_group: WorkerGroup) -> None:
        self._started = worker_group

    def after_controller_state_update(
        self, previous_state: states.TrainControllerState, current_state: states.TrainControllerState
    ) -> None:
        """Tells the events, and ends the run where it comes to nothing.

        Raises:
            GivenUpError: Ray Train then ends the group and the run.
        """
        if isinstance(previous_state, states.SchedulingState) and not isinstance(current_state, states.RunningState):
            self._release()
        if isinstance(current_state, states.RunningState):
            self._waits_since = None
        elif isinstance(current_state, states.PreemptingState):
            if not isinstance(previous_state, states.PreemptingState):
                nodes = ", ".join(current_state.preemption_info.preempted_node_ids)
                ranks = ", ".join(map(str, current_state.preemption_info.preempted_ranks))
                self._run.event("preempted", f"node {nodes} of rank {ranks} is about to go; each step is saved")
        elif isinstance(current_state, states.ResizingState):
            decision = current_state.scaling_decision
            assert isinstance(decision, ResizeDecision)
            self._left(f"the group ends to start again with {decision.num_workers} workers, for whom there is room")
        elif isinstance(current_state, states.InitializingState | states.RestartingState | states.ReschedulingState):
            if current_state is previous_state:
                self._wait(self._min_workers)
                time.sleep(LOOK_S)  # the controller's own loop would not sleep
            elif not isinstance(current_state, states.InitializingState):
                self._failed(current_state.training_failed_error)
            if self._ends():
                raise GivenUpError("fatal.json says why, or the run was asked to stop")

    def _release(self) -> None:
        """Gives back the room of a group that failed late in its start; Ray Train keeps it until the driver ends."""
        if self._started is not None and self._started.has_started():
            self._started.shutdown()

    def _ends(self) -> bool:
        return fatal(self._run).exists() or self._run.stop.exists()

    def _left(self, why: str) -> None:
        step = latest_step(self._run.checkpoints) or 0
        self._run.event("workers_left", f"{why}; the next group goes on from step {step}")

    def _failed(self, error: Exception) -> None:
        failure = getattr(error, "controller_failure", error)
        if fatal(self._run).exists():
            self._run.event("workers_left", "a worker failed in a way that would come again; the job ends")
        elif isinstance(failure, PreemptionError):
            self._left("the node that was about to go is given up")
        elif isinstance(failure, WorkerGroupStartupTimeoutError):
            self._wait(failure.num_workers)
        else:
            reasons = _reasons(failure)
            with self._run.logging("[controller] "):
                logger.warning("%s", failure)
            self._left(reasons)
            taken = isinstance(failure, WorkerGroupError) and any(map(_preempted, failure.worker_failures.values()))
            if not taken:
                self._count(reasons, _hint(failure))

    def _wait(self, workers: int) -> None:
        reason = f"there is no room for {workers} workers on the nodes of the cluster"
        if self._waits_since is None:
            self._waits_since = self._clock()
            self._run.event("waiting", f"{reason}; the job waits for it")
        elif self._clock() - self._waits_since > MAX_WAIT_S:
            give_up(self._run, f"{reason}: waited for it for {MAX_WAIT_S:.0f} s", _ROOM)

    def _count(self, reasons: str, hint: str) -> None:
        step = latest_step(self._run.checkpoints)
        self._failures = self._failures + 1 if step == self._step else 1
        self._step = step
        if self._failures > MAX_FAILURES:
            times = f"{self._failures} times in a row at step {step or 0}, expected at most {MAX_FAILURES}"
            give_up(self._run, f"{reasons}: {times} without a new checkpoint", hint)


def _reasons(failure: Exception) -> str:
    """Why workers failed, in one line."""
    if isinstance(failure, ActorDiedError):
        return "the process that watches over the workers died, and they with it"
    if not isinstance(failure, WorkerGroupError):
        return f"the group could not be kept: {_first_line(failure)}"
    return "; ".join(f"rank {rank}: {_first_line(error)}" for rank, error in sorted(failure.worker_failures.items()))


def _hint(failure: Exception) -> str:
    """That of a worker, where one has one."""
    failures = failure.worker_failures.values() if isinstance(failure, WorkerGroupError) else ()
    return next((hint for error in failures if (hint := getattr(error, "hint", None))), _AGAIN)


def _first_line(error: Exception) -> str:
    cause = _cause(error)
    if isinstance(cause, ActorDiedError):
        return "its process died"  # Ray has many words for it, and no other reason
    return shorten(f"{type(cause).__name__}: {cause}".strip().splitlines()[0], _CHARACTERS, placeholder=" ...")


def _cause(error: Exception) -> Exception:
    """What lies below Ray's own words: why a worker no longer answers, or what was raised in it."""
    cause: Exception = getattr(error, "health_check_failure", None) or getattr(error, "cause", None) or error
    return cause


def _preempted(error: Exception) -> bool:
    """Whether this worker died because its node was taken away."""
    cause = _cause(error)
    return isinstance(cause, RayActorError) and cause.preempted
