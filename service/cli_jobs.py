"""The `manta` commands of jobs: submit, look, follow, pause, resume, cancel, retry, clone, compare."""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from service import cli_dry_run
from service.patches import patch_of
from service.progress import follow
from service.terminal import (
    CANCELLED,
    FAILED,
    OK,
    USAGE,
    AsJson,
    Base,
    connected,
    err,
    fail,
    out,
    read_entry,
    show_json,
    show_table,
)
from workloads.record import online_names
from workloads.spec_deploy import DeploySpec

JobId = Annotated[str, typer.Argument(help="As `manta jobs` lists it.")]
LAST_EVENTS = 5  # that `manta job` shows


def submit(
    specs: Annotated[
        list[Path],
        typer.Argument(exists=True, dir_okay=False, help="JobSpecs, YAML or JSON; job:$NAME is an earlier one."),
    ],
    base: Base = None,
    stay: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what it would do and cost; submit nothing.")] = False,
    gpu: Annotated[str | None, typer.Option(help="Of a dry run: tell the time by the peak of this GPU.")] = None,
    as_json: AsJson = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="As a RayJob with a cluster of its own, by kubectl.")] = False,
    release: Annotated[str | None, typer.Option(help="Of --k8s: the Helm release [the only one].")] = None,
    group: Annotated[str | None, typer.Option(help="Of --k8s: the worker group [the first that fits].")] = None,
) -> None:
    """Submits a job, or a list of which each may come after earlier ones: all of them or none."""
    parsed = [read_entry(spec, base) for spec in specs]
    if len(specs) > 1 and (stay or dry_run or k8s):
        fail("got several jobs with --follow, --dry-run or --k8s, expected one; submit them, then follow one", USAGE)
    if dry_run and (stay or k8s):
        fail("got --dry-run with --follow or --k8s, expected it alone: nothing runs", USAGE)
    if gpu is not None and not dry_run:
        fail("got --gpu without --dry-run; the job says what it runs on, in resources", USAGE)
    if k8s and isinstance(parsed[0], DeploySpec):
        fail("got a deployment with --k8s, expected a job of its own; submit it to a service", USAGE)
    if k8s:
        _submit_to_kubernetes(parsed[0], stay, release, group, as_json)
        return
    if release is not None or group is not None:
        fail("got --release or --group, expected --k8s with them; leave them out", USAGE)
    documents = [spec.model_dump(mode="json") for spec in parsed]
    with connected() as client:
        if dry_run:
            cli_dry_run.show(client.dry_run(documents[0], gpu=gpu), as_json)
            return
        made = client.submit_all(documents) if len(specs) > 1 else [client.submit(documents[0])]
        if stay:
            _follow(client, made[0]["id"], as_json)
        elif as_json:
            show_json(made if len(specs) > 1 else made[0])
        else:
            for job in made:
                out.print(" ".join(job[key] for key in ("id", "state", "reason") if job[key] is not None))


def _submit_to_kubernetes(spec: Any, stay: bool, release: str | None, group: str | None, as_json: bool) -> None:
    from service import kubernetes

    if stay:
        fail("got --follow with --k8s: `kubectl get rayjob` tells of it, and `manta logs -f` once it runs", USAGE)
    try:
        job_id = kubernetes.submit(spec, release=release, group=group)
    except kubernetes.KubernetesError as error:
        fail(error)
    if as_json:
        show_json({"id": job_id})
        return
    out.print(f"{job_id} is created: `kubectl get rayjob {job_id}`; `manta job {job_id}` once it runs")


def _follow(client: Any, job_id: str, as_json: bool) -> None:
    """Shows progress until the end; Ctrl-C detaches."""
    try:
        job = follow(client, job_id)
    except KeyboardInterrupt:
        fail(
            f"\ndetached: {job_id} goes on; `manta cancel {job_id}` ends it, `manta logs -f {job_id}` follows it",
            CANCELLED,
        )
    if as_json:
        show_json(job)
    else:
        _print_job(job)
    raise typer.Exit({"SUCCEEDED": OK, "CANCELLED": CANCELLED}.get(job["state"], FAILED))


def _print_job(job: dict[str, Any], online: Sequence[dict[str, Any]] = ()) -> None:
    rows = [
        ("id", job["id"]),
        ("name", job["name"]),
        ("state", job["state"]),
        ("after", ", ".join(job["after"]) or None),
        ("reason", _why(job)),
        ("hint", job["hint"]),
        ("priority", job["priority"]),
        ("method", job["method"]),
        ("search", job["search"]),
        ("deploys", job["deploy"]),
        ("progress", _progress(job)),
        ("attempt", job["attempt"]),
        ("created", job["created_at"]),
        ("finished", job["finished_at"]),
        ("skipped samples", len(job["skipped"]) or None),
        ("models", ", ".join(job["models"]) or None),
        *_found(job["found"]),
    ]
    for result in job["evaluations"]:
        values = ", ".join(f"{who} {value['mean']:.3f}" for who, value in result["results"].items())
        rows.append((result["label"], values))
    newest = {result["entry"]: result for result in online}
    rows += [(r["label"], f"{r['mean']:.3f} at step {r['step']}") for _, r in sorted(newest.items())]
    show_table(["field", "value"], [row for row in rows if row[1] is not None])


def _why(job: dict[str, Any]) -> str | None:
    """Why it is in its state; of one that waits, its place in the queue and when it may start."""
    place = job["queue"]
    if place is None or place["position"] is None:
        return str(job["reason"]) if job["reason"] else None
    said = [f"{place['position']} of {place['length']} in the queue", place["reason"]]
    said.append(f"starts about {place['expected_start'][:16]} UTC" if place["expected_start"] else None)
    return "; ".join(part for part in said if part)


def _progress(job: dict[str, Any]) -> str:
    step, total, epoch = (job["progress"][name] for name in ("step", "total_steps", "epoch"))
    return f"{step} of {total} candidates" if job["search"] else f"step {step} of {total}, epoch {epoch}"


def _found(found: dict[str, Any] | None) -> list[tuple[str, str]]:
    """What a search that ended has found."""
    if found is None:
        return []
    rows = [("found", found["structure"]), ("score", f"{found['score']:.6g}")]
    rows += [(name, f"{value:,.10g}") for name, value in found["costs"].items()]
    if (latency := found["latency"]) is not None:
        rows.append(("latency", f"{latency['ms']:.4g} ms an image by {latency['batch_size']} on {latency['device']}"))
    return rows


def _with_online(points: list[dict[str, Any]], online: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The curve with a column for each evaluation of checkpoints."""
    columns = online_names(online)
    found: defaultdict[int, dict[str, Any]] = defaultdict(dict)
    for result in online:
        found[result["step"]][columns[result["entry"]]] = result["mean"]
    return [point | found[point["step"]] for point in points]


def _print_events(found: list[dict[str, Any]]) -> None:
    show_table(["time", "event", "message"], [(e["time"][:19], e["kind"], e["message"]) for e in found])


def jobs(limit: Annotated[int, typer.Option(min=1)] = 20, as_json: AsJson = False) -> None:
    """Lists jobs, the newest first."""
    with connected() as client:
        found = client.jobs(limit=limit)
    if as_json:
        show_json(found)
        return
    rows = []
    for j in found:
        progress, what = j["progress"], j["method"] or j["search"] or "deploy"
        rows.append([j["id"], j["name"], what, j["state"], progress["step"], progress["total_steps"]])
        rows[-1] += [j["created_at"][:19], _why(j)]
    show_table(["id", "name", "method", "state", "step", "of", "created", "reason"], rows)


def job(job_id: JobId, as_json: AsJson = False) -> None:
    """Shows one job."""
    with connected() as client:
        found = client.job(job_id)
        happened = [] if as_json else client.events(job_id)
        online = [] if as_json else client.evaluations(job_id)["online"]
    if as_json:
        show_json(found)
    else:
        _print_job(found, online)
        _print_events(happened[-LAST_EVENTS:])


def logs(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="From its start on, until the job ends.")] = False,
    level: Annotated[str | None, typer.Option(help="At least: DEBUG, INFO, WARNING, ERROR.")] = None,
    rank: Annotated[int | None, typer.Option(min=0, help="Of the worker that wrote the line.")] = None,
) -> None:
    """Prints the end of the log of a job; followed, until it ends or is paused."""
    wanted = {name: value for name, value in (("level", level), ("rank", rank)) if value is not None}
    with connected() as client:
        try:
            for line in client.follow_logs(job_id, **wanted) if follow else client.logs(job_id, **wanted).splitlines():
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
            if follow:
                _say_paused(client.job(job_id))
        except KeyboardInterrupt:
            raise typer.Exit(OK) from None


def _say_paused(job: dict[str, Any]) -> None:
    """What is followed of a job ends where it is paused, perhaps for days."""
    if job["state"] == "PAUSED":
        again = f"`manta resume {job['id']}`, then follow it again"
        err.print(f"{job['id']} is paused ({job['reason']}): {again}", markup=False, highlight=False, soft_wrap=True)


def metrics(job_id: JobId, as_json: AsJson = False) -> None:
    """Prints the curve of a job, and of evaluations of its checkpoints."""
    with connected() as client:
        points = _with_online(client.metrics(job_id), client.evaluations(job_id)["online"])
    if as_json:
        show_json(points)
        return
    columns = list(dict.fromkeys(key for point in points for key in point))
    show_table(
        columns, [[f"{p.get(c):.6g}" if isinstance(p.get(c), float) else p.get(c) for c in columns] for p in points]
    )


def report(
    job_id: JobId,
    file: Annotated[Path | None, typer.Option("--out", "-o", help="Default: JOB.html in this folder.")] = None,
) -> None:
    """Writes the report of a job: curves, evaluations, pictures, on one page that needs no network."""
    with connected() as client:
        text = client.report(job_id)
    file = file or Path(f"{job_id}.html")
    try:
        file.write_text(text)
    except OSError as error:
        fail(f"got --out {file}, which cannot be written ({error.strerror}); name a file in a folder that is there")
    out.print(str(file), markup=False, highlight=False, soft_wrap=True)


def cancel(job_id: JobId, as_json: AsJson = False) -> None:
    """Asks a job to write a last checkpoint and end."""
    with connected() as client:
        _print_state(client.cancel(job_id), as_json)


def pause(job_id: JobId, as_json: AsJson = False) -> None:
    """Asks a job to write a checkpoint and give back its CPUs and GPUs until it is resumed."""
    with connected() as client:
        _print_state(client.pause(job_id), as_json)


def resume(
    job_id: JobId,
    max_duration: Annotated[
        str | None, typer.Option(help="In place of the job's own: seconds, 30m, 12h; also after it was reached.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Queues a paused job again; it goes on from its checkpoint."""
    with connected() as client:
        _print_state(client.resume(job_id, max_duration=max_duration), as_json)


def retry(job_id: JobId, as_json: AsJson = False) -> None:
    """Queues a job again that failed or was cancelled; it goes on from its checkpoint."""
    with connected() as client:
        _print_state(client.retry(job_id), as_json)


def clone(
    job_id: JobId,
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="May be repeated; null removes a field.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Submits a job once more, with changes: `manta clone JOB --set optimizer.lr=1e-3 --set name=slower`."""
    try:
        patch = patch_of(changes or [])
    except ValueError as error:
        fail(error, USAGE)
    with connected() as client:
        _print_state(client.clone(job_id, patch), as_json)


def diff(job_id: JobId, other_id: JobId, as_json: AsJson = False) -> None:
    """Shows where two jobs differ, and what their runs were made of."""
    with connected() as client:
        found = client.diff(job_id, other_id)
    if as_json:
        show_json(found)
        return
    rows = [
        (what, d["path"], *(json.dumps(d[side]) if side in d else None for side in ("a", "b")))
        for what in ("spec", "provenance")
        for d in found[what]
    ]
    show_table(["of", "where", job_id, other_id], rows)


def events(
    job_id: JobId,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="As they come, a line each.")] = False,
    as_json: AsJson = False,
) -> None:
    """Prints what happened to a job: states, attempts, workers that came and went."""
    with connected() as client:
        if follow:
            _follow_events(client, job_id, as_json)
            return
        found = client.events(job_id)
    if as_json:
        show_json(found)
    else:
        _print_events(found)


def _follow_events(client: Any, job_id: str, as_json: bool) -> None:
    try:
        for event in client.follow_events(job_id):
            line = json.dumps(event) if as_json else "\t".join((event["time"][:19], event["kind"], event["message"]))
            sys.stdout.write(line + "\n")
            sys.stdout.flush()
        _say_paused(client.job(job_id))
    except KeyboardInterrupt:
        raise typer.Exit(OK) from None


def _print_state(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(found)
    else:
        out.print(f"{found['id']} {found['state']}")


COMMANDS = (submit, jobs, job, logs, events, metrics, report, pause, resume, cancel, retry, clone, diff)
