"""/v1/jobs: submit, list, look, pause, resume, cancel, retry, clone, compare, curves, events, logs, reports."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Body, Header, Query, Request, Response
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Field

from service.access import CallerDep
from service.curves import thinned
from service.declarations import MOST_INT, Cursor, Limit, Shown, answers, refuses
from service.documents import Document
from service.errors import Conflict, NotFound
from service.events import CURSOR, START
from service.job_views import Comparison, Evaluations, EventPage, Forecast, JobList, JobPage, JobView, MetricsPage
from service.jobs import no_such_job
from service.logs import TAIL, Level, Wanted, part
from service.parts import JobsDep, PartsDep
from service.principal import ProjectName
from service.report import page
from service.report_search import search_page
from service.store import JobState
from service.streams import STREAMED, Follow, job_events, log_lines, points
from workloads import catalog
from workloads.artifact import PICTURES, read_card
from workloads.spec_any import AnySpec
from workloads.spec_deploy import DeploySpec
from workloads.spec_training import Seconds

Spec = Annotated[Document, Shown(AnySpec)]
Entry = Annotated[Document, Shown(AnySpec | DeploySpec)]
ProjectQuery = Annotated[ProjectName | None, Query(description="Default: that of the token.")]
Key = Annotated[str | None, Header(min_length=1, max_length=200, description="One job for all requests that have it.")]
router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

MOST = 100  # jobs of one list
MADE = answers(201, Location="Of the job.") | refuses(Conflict)
AGAIN = answers(200, JobView, "The job that the Idempotency-Key made before.", Location="Of the job.")
LOG: dict[int | str, dict[str, Any]] = {
    200: answers(200, X_Next_Offset="`offset` of what follows, where it is not followed.")[200] | STREAMED
}
STREAM: dict[int | str, dict[str, Any]] = {200: STREAMED}
Place = Annotated[int | None, Header(alias="Last-Event-ID", ge=0, le=MOST_INT)]
EXAMPLES: dict[str, Any] = {
    "training": {
        "value": {
            "name": "digits-mae",
            "method": {"name": "mae", "decoder_dim": 64, "decoder_depth": 1},
            "model": {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 96, "depth": 3, "heads": 4},
            "data": {"train": {"shards": "/data/digits/train-{000000..000001}.tar"}},
            "epochs": 20,
            "batch_size": 32,
            "register": "digits-mae",
        }
    },
    "search": {
        "value": {
            "name": "small-network",
            "search": {"name": "zen_nas", "budget": {"parameters": 2_000_000}},
            "resources": {"workers": 2},
        }
    },
}


class Resume(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    max_duration: Seconds | None = Field(default=None, gt=0, description='In place of the job\'s own: 7200, "2h".')


@router.post(
    "",
    status_code=201,
    response_model=JobView,
    responses=MADE
    | answers(200, JobView | Forecast, "The job that the Idempotency-Key made before, or what a dry run found."),
)
def submit_job(
    body: Annotated[Spec, Body(openapi_examples=EXAMPLES)],
    parts: PartsDep,
    caller: CallerDep,
    request: Request,
    response: Response,
    project: ProjectQuery = None,
    idempotency_key: Key = None,
    dry_run: Annotated[
        bool, Query(description="Answers what the job would do and cost, 200, and stores none.")
    ] = False,
    gpu: Annotated[str | None, Query(max_length=80, description="Of a dry run: tells the time by its peak.")] = None,
) -> JobView | JSONResponse:
    """Accepts a job: 201 means that it is stored and will run. The same Idempotency-Key answers the same job, 200."""
    request.state.project = chosen = parts.projects.chosen(caller, project)
    if dry_run:
        return JSONResponse(parts.submissions.dry_run(body, caller, chosen, gpu))
    job, created = parts.submissions.submit(body, idempotency_key, caller, chosen)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return parts.jobs.view(job)


@router.post(
    ":batch",
    status_code=201,
    responses=refuses(Conflict) | answers(200, JobList, "The jobs that the Idempotency-Key made before."),
)
def submit_jobs(
    body: Annotated[
        list[Entry],
        Body(min_length=1, max_length=MOST, description="Jobs, as one by one; what they register may be deployed."),
    ],
    parts: PartsDep,
    caller: CallerDep,
    request: Request,
    response: Response,
    project: ProjectQuery = None,
    idempotency_key: Annotated[str | None, Header(min_length=1, max_length=190)] = None,
) -> JobList:
    """Accepts all jobs of a list or none; `after: [$name]` and `job:$name` mean an earlier one by its `name`."""
    request.state.project = chosen = parts.projects.chosen(caller, project)
    jobs, created = parts.submissions.submit_all(body, idempotency_key, caller, chosen)
    request.state.made = tuple(job.id for job in jobs)  # for the audit log, as one Location cannot name them
    response.status_code = 201 if created else 200
    return {"jobs": parts.jobs.views(jobs)}


@router.get("")
def list_jobs(
    parts: PartsDep,
    caller: CallerDep,
    limit: Limit = 50,
    cursor: Cursor = None,
    state: JobState | None = None,
    project: ProjectQuery = None,
) -> JobPage:
    """Newest first, of one project or of all that the token sees; `next`: the following page's cursor, or null."""
    chosen = caller.project if project is None else parts.projects.chosen(caller, project)
    page = parts.jobs.list(limit=limit, before=cursor, state=state, project=chosen)
    return {"jobs": parts.jobs.views(page), "next": page[-1].number if len(page) == limit else None}


@router.get("/{job_id}")
def get_job(job_id: str, jobs: JobsDep) -> JobView:
    return jobs.view(jobs.get(job_id))


@router.post("/{job_id}:cancel", status_code=202)
def cancel_job(job_id: str, jobs: JobsDep) -> JobView:
    """Asks the job to write a last checkpoint and end. Repeating it, or cancelling a finished job, changes nothing."""
    return jobs.view(jobs.cancel(job_id))


@router.post("/{job_id}:pause", status_code=202, responses=refuses(Conflict))
def pause_job(job_id: str, jobs: JobsDep) -> JobView:
    """Asks the job to write a checkpoint and give back what it runs on. Repeating it changes nothing."""
    return jobs.view(jobs.pause(job_id))


@router.post("/{job_id}:resume", status_code=202, responses=refuses(Conflict))
def resume_job(job_id: str, jobs: JobsDep, body: Resume | None = None) -> JobView:
    """Queues a paused job again; so too one that reached its `max_duration`, given a longer one. May be repeated."""
    return jobs.view(jobs.resume(job_id, body.max_duration if body else None))


@router.post("/{job_id}:retry", status_code=202, responses=refuses(Conflict))
def retry_job(job_id: str, jobs: JobsDep) -> JobView:
    """Queues a job again that failed or was cancelled; it goes on from its checkpoint. Repeating it changes nothing."""
    return jobs.view(jobs.retry(job_id))


@router.post("/{job_id}:clone", status_code=201, responses=MADE | AGAIN)
def clone_job(
    job_id: str,
    patch: Annotated[
        Document,
        Body(
            description="A JSON merge patch (RFC 7396) of the job's spec.", examples=[{"optimizer": {"lr": 1e-3}}, {}]
        ),
    ],
    parts: PartsDep,
    caller: CallerDep,
    response: Response,
    idempotency_key: Key = None,
) -> JobView:
    """Accepts a new job: this one with changes; the rest is as of a submission. `{}` runs it once more."""
    job, created = parts.submissions.clone(job_id, patch, idempotency_key, caller)
    response.status_code = 201 if created else 200
    response.headers["Location"] = f"/v1/jobs/{job.id}"
    return parts.jobs.view(job)


@router.get("/{job_id}/diff/{other_id}")
def compare_jobs(job_id: str, other_id: str, jobs: JobsDep, caller: CallerDep) -> Comparison:
    """Where two jobs differ: `path`, `a` and `b` of each place in their specs, and in what their runs were made of."""
    other = jobs.find(other_id)
    if other is None or not caller.sees(other.project):
        raise no_such_job(other_id)
    return jobs.diff(job_id, other_id)


@router.get("/{job_id}/events", response_model=EventPage, responses=STREAM)
def get_job_events(
    job_id: str,
    parts: PartsDep,
    caller: CallerDep,
    after: Annotated[str, Query(pattern=CURSOR)] = START,
    follow: Follow = False,
    last_event_id: Annotated[str | None, Header(pattern=CURSOR)] = None,
) -> EventPage | Response:
    """What happened to the job: events behind `after`, the `cursor` of an earlier one, which is the id in a stream."""
    if follow:
        source = job_events(parts.jobs, job_id, last_event_id or after)
        return parts.streams.answer(parts.jobs.get(job_id).id, source, caller)
    return {"events": parts.jobs.events(job_id, after)}


@router.get("/{job_id}/metrics", response_model=MetricsPage, responses=STREAM)
def get_job_metrics(
    job_id: str,
    parts: PartsDep,
    caller: CallerDep,
    after_step: Annotated[int, Query(ge=-1, le=MOST_INT)] = -1,
    max_points: Annotated[int | None, Query(ge=4, le=MOST_INT)] = None,
    by: Annotated[str, Query(max_length=80)] = "loss",
    follow: Follow = False,
    last_event_id: Place = None,
) -> MetricsPage | Response:
    """The curve: points with a step above `after_step`; with `max_points` those that show lows and highs of `by`.

    Followed, each comes when it is written: of a step that a resumed run repeats the later one counts.
    """
    run = parts.jobs.run_folder(job_id)
    if follow:
        return parts.streams.answer(job_id, points(run, after_step, last_event_id or 0), caller)
    found = list(run.read_metrics(after_step=after_step))
    return {"points": found if max_points is None else thinned(found, max_points, by)}


@router.get("/{job_id}/evaluations")
def get_job_evaluations(job_id: str, jobs: JobsDep) -> Evaluations:
    """Results of the finished model, and `online` those of checkpoints while it trained, in the order of steps."""
    return {"evaluations": jobs.view(jobs.get(job_id))["evaluations"], "online": jobs.run_folder(job_id).read_online()}


@router.get("/{job_id}/report", response_class=HTMLResponse)
def get_job_report(job_id: str, jobs: JobsDep) -> HTMLResponse:
    """One page for people: curves, evaluations, what the method draws, the JobSpec; of a job in any state."""
    view: dict[str, Any] = dict(jobs.view(jobs.get(job_id)))
    run = jobs.run_folder(job_id)
    if view["deploy"] is not None:
        raise NotFound(f"got {job_id}, which deploys a model and has no report", f"GET /v1/models/{view['deploy']}")
    kind = "method" if view["search"] is None else "search"
    try:
        paper = catalog.load(kind, view[kind]).paper
    except catalog.UnknownName as error:  # of a job that came by `ray job submit`, from another version
        raise NotFound(f"{error}; so {job_id} has no report here", f"GET /v1/jobs/{job_id}/metrics") from None
    if view["search"] is not None:
        return HTMLResponse(search_page(job=view, points=list(run.read_metrics()), paper=paper, artifact=run.artifact))
    done = run.artifact.exists()
    sheet = run.artifact / PICTURES
    text = page(
        job=view,
        points=list(run.read_metrics()),
        online=run.read_online(),
        paper=paper,
        parameters=read_card(run.artifact).parameters if done else None,
        sheet=sheet.read_bytes() if sheet.exists() else None,
        summary={},
    )
    return HTMLResponse(text)


@router.get("/{job_id}/logs", response_class=PlainTextResponse, responses=LOG)
def get_job_logs(
    job_id: str,
    parts: PartsDep,
    caller: CallerDep,
    follow: Follow = False,
    offset: Annotated[
        int | None, Query(ge=0, le=MOST_INT, description="`X-Next-Offset`, or 0; default: the last bytes.")
    ] = None,
    limit: Annotated[int, Query(ge=1, le=1 << 22, description="Bytes that are looked at.")] = TAIL,
    level: Annotated[Level | None, Query(description="At least.")] = None,
    rank: Annotated[int | None, Query(ge=0, le=MOST_INT, description="Of the worker that wrote the line.")] = None,
    last_event_id: Place = None,
) -> Response:
    """A part of the log as text, `X-Next-Offset` being the place behind it; `follow=true`: all of it, as it grows.

    The ids of the events of a stream are offsets; it ends when the job has ended or is paused.
    """
    run, wanted = parts.jobs.run_folder(job_id), Wanted(level, rank)
    if follow:
        start = offset or 0 if last_event_id is None else last_event_id
        return parts.streams.answer(job_id, log_lines(run.log, start, wanted), caller)
    if run.log.exists():
        text, end = part(run.log, offset, limit, wanted)
        return PlainTextResponse(text, headers={"X-Next-Offset": str(end)})
    attempt = parts.jobs.get(job_id).attempt
    return PlainTextResponse(parts.ray.log_tail(job_id, attempt))  # the run never spoke: what its process printed
