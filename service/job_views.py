"""Jobs in answers. Times are ISO 8601 in UTC.

They are dictionaries that mypy and the OpenAPI document know the keys of. What is read from files of a run is handed on
as it is (`Shown`): a curve of a million points is not looked through on its way.
"""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import Field
from typing_extensions import TypedDict

from service.declarations import Shown
from service.queue import Priority
from service.store import JobState
from workloads.winner import Latency

Document = dict[str, Any]


class Progress(TypedDict):
    """Of the newest attempt; of a search `step` counts candidates."""

    step: int
    total_steps: int
    epoch: int


class Score(TypedDict, total=False):
    """Over the seeds of an evaluation."""

    mean: float
    std: float
    seeds: Annotated[list[float], Field(description="The value of each.")]


class EvaluationResult(TypedDict, total=False):
    """One entry of `evaluate` of a finished model; more keys by evaluation."""

    name: str
    label: str
    config: Document
    metric: str
    results: Annotated[dict[str, Score], Field(description="Of `model`, and of what it is compared with.")]


class OnlineResult(TypedDict, total=False):
    """One entry of `evaluate` of a checkpoint."""

    step: int
    epoch: float
    entry: Annotated[int, Field(description="Position in `evaluate`.")]
    label: str
    metric: str
    mean: float
    std: float
    seeds: list[float]


class FoundView(TypedDict):
    """What a search that ended has found."""

    structure: str
    model: Annotated[Document, Field(description="`model` of a job that trains it.")]
    score: float
    costs: dict[str, float]
    latency: Latency | None


Results = Annotated[list[Any], Shown(list[EvaluationResult])]
OnlineResults = Annotated[list[Any], Shown(list[OnlineResult])]


class QueueView(TypedDict):
    """Where a job that waits stands."""

    position: Annotated[int | None, Field(description="From 1; null: it waits for other jobs, or just came.")]
    length: Annotated[int, Field(description="Of the queue.")]
    expected_start: Annotated[str | None, Field(description="null: the jobs before it tell too little.")]
    reason: Annotated[str | None, Field(description="What it waits for.")]


class JobView(TypedDict):
    """One job."""

    id: str
    name: str
    project: str
    owner: Annotated[str, Field(description="Who submitted it.")]
    state: JobState
    attempt: Annotated[int, Field(description="0: none has begun.")]
    after: Annotated[list[str], Field(description="Jobs that must have succeeded before it starts.")]
    reason: Annotated[str | None, Field(description="Why it is in its state, where that says more.")]
    hint: Annotated[str | None, Field(description="What to do about it.")]
    priority: Priority
    queue: Annotated[QueueView | None, Field(description="null: it does not wait.")]
    method: Annotated[str | None, Field(description="null: it does not train.")]
    search: Annotated[str | None, Field(description="null: it does not search.")]
    deploy: Annotated[str | None, Field(description="The model that it deploys; null: it does not.")]
    origin: Annotated[
        str, Field(description="`rest`; `ray`: by `ray job submit`; `outside`: by `manta submit --k8s`, or by hand.")
    ]
    created_at: str
    started_at: str | None
    finished_at: str | None
    progress: Progress
    ran_s: Annotated[float, Field(description="Seconds of training, over all attempts.")]
    skipped: Annotated[list[str], Field(description="Samples that could not be decoded, and why.")]
    warnings: list[str]
    evaluations: Results
    models: Annotated[list[str], Field(description="name@version of what it has registered.")]
    found: Annotated[Document | None, Shown(FoundView | None)]
    spec: Annotated[Document, Field(description="As it was accepted, with defaults.")]


class JobPage(TypedDict):
    """Newest first."""

    jobs: list[JobView]
    next: Annotated[int | None, Field(description="`cursor` of the following page; null: this is the last.")]


class JobList(TypedDict):
    """In the order of the request."""

    jobs: list[JobView]


class EventView(TypedDict):
    time: str
    kind: Annotated[str, Field(description="A state in lower case, or workers_joined, workers_left, preempted, ...")]
    message: str
    cursor: Annotated[str, Field(description="`after` of a request for what follows.")]


class EventPage(TypedDict):
    """In the order of time."""

    events: list[EventView]


class Point(TypedDict):
    """A point of the curve; more keys by method, numbers."""

    step: int
    epoch: NotRequired[float]
    loss: NotRequired[float | None]


class MetricsPage(TypedDict):
    """In the order of steps."""

    points: Annotated[list[Any], Shown(list[Point])]


class Evaluations(TypedDict):
    evaluations: Results
    online: OnlineResults


class Difference(TypedDict):
    """`a` or `b` is left out where that one has nothing there."""

    path: Annotated[str, Field(description="In dots.")]
    a: NotRequired[Any]
    b: NotRequired[Any]


Differences = Annotated[list[Any], Shown(list[Difference])]


class Comparison(TypedDict):
    """Where two jobs differ."""

    a: str
    b: str
    spec: Differences
    provenance: Annotated[Differences, Field(description="What their runs were made of, once both have begun.")]


class Forecast(TypedDict, total=False):
    """What a dry run answers. Of a training `parameters` and what follows it, of a search `candidates`, ..."""

    name: str
    method: str
    search: str
    parameters: int
    trained: int
    step_flops: int | None
    flops: int | None
    state_bytes: int
    activation_bytes: int | None
    samples: dict[str, int | None]
    epoch_steps: int | None
    steps: int | None
    decode_s: float | None
    notes: list[str]
    candidates: int
    budget: Document
    least: dict[str, float]
    step_time_s: float | None
    eta_s: float | None
    eta_from: Annotated[str | None, Field(description="Earlier runs, or the peak of a GPU.")]
    earlier_runs: list[str]
    decode_cores: int | None
