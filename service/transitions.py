"""What users may ask of a job that is there, and what comes of it in each state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from service.errors import Conflict
from service.store import TERMINAL, JobState

Moves = Mapping[JobState, JobState]


@dataclass(frozen=True)
class Request:
    """One verb.

    Attributes:
        verb: as in `POST /v1/jobs/{id}:verb`.
        reason: of what comes of it.
        moves: from each state to the next, or to itself where the wish is fulfilled; others refuse it.
    """

    verb: str
    reason: str
    moves: Moves

    def next_state(self, job_id: str, state: JobState) -> JobState:
        """Where it brings a job.

        Raises:
            Conflict: it makes no sense in this state; says what to do instead.
        """
        if state in self.moves:
            return self.moves[state]
        if state == "PAUSING":
            hint = "it writes its checkpoint; ask again when it is PAUSED"
        elif state == "PAUSED":
            hint = "resume it"
        elif state in TERMINAL or state == "CANCELLING":
            hint = "it stays as it is; submit a new job"
        else:
            hint = "pause it first: a run reads max_duration when it starts"
        raise Conflict(f"got {self.verb} for {job_id}, which is {state}, expected {' or '.join(self.moves)}", hint)


_cancel: Moves = {
    "QUEUED": "CANCELLED",
    "PAUSED": "CANCELLED",
    "STARTING": "CANCELLING",
    "RUNNING": "CANCELLING",
    "PAUSING": "CANCELLING",
    "CANCELLING": "CANCELLING",
}
CANCEL = Request("cancel", "cancelled on request", {**_cancel, **{state: state for state in TERMINAL}})
PAUSE = Request(
    "pause",
    "paused on request",
    {"QUEUED": "PAUSED", "STARTING": "PAUSING", "RUNNING": "PAUSING", "PAUSING": "PAUSING", "PAUSED": "PAUSED"},
)
RESUME = Request(
    "resume",
    "resumed on request",
    {"PAUSED": "QUEUED", "QUEUED": "QUEUED", "STARTING": "STARTING", "RUNNING": "RUNNING"},
)
RETRY = Request(
    "retry",
    "retried on request",
    {"FAILED": "QUEUED", "CANCELLED": "QUEUED", "QUEUED": "QUEUED", "STARTING": "STARTING", "RUNNING": "RUNNING"},
)
LENGTHEN = Request("resume with max_duration", "resumed with a longer max_duration", {"PAUSED": "QUEUED"})
LENGTHEN_ENDED = Request(LENGTHEN.verb, LENGTHEN.reason, {"PAUSED": "QUEUED", "FAILED": "QUEUED"})  # by the one before
