"""The `manta` commands of jobs: submit, look, follow, pause, resume, cancel."""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from service.progress import follow
from service.terminal import (
    CANCELLED,
    FAILED,
    OK,
    USAGE,
    AsJson,
    Base,
    Spec,
    connected,
    fail,
    out,
    read_job,
    show_json,
    show_table,
)
from workloads.record import online_names

JobId = Annotated[str, typer.Argument(help="As `manta jobs` lists it.")]
LAST_EVENTS = 5  # that `manta job` shows


def submit(
    spec: Spec,
    base: Base = None,
    stay: Annotated[bool, typer.Option("--follow", "-f", help="Stay until the job ends.")] = False,
    as_json: AsJson = False,
    k8s: Annotated[bool, typer.Option("--k8s", help="As a RayJob with a cluster of its own, by kubectl.")] = False,
    release: Annotated[str | None, typer.Option(help="Of --k8s: the Helm release [the only one].")] = None,
    group: Annotated[str | None, typer.Option(help="Of --k8s: the worker group [the first that fits].")] = None,
) -> None:
    """Submits a job."""
    if k8s:
        _submit_to_kubernetes(read_job(spec, base), stay, release, group, as_json)
        return
    if release is not None or group is not None:
        fail("got --release or --group, expected --k8s with them; leave them out", USAGE)
    document = read_job(spec, base).model_dump(mode="json")
    with connected() as client:
        job = client.submit(document)
        if as_json and not stay:
            show_json(job)
        elif not stay:
            out.print(f"{job['id']} {job['state']}")
        if stay:
            _follow(client, job["id"], as_json)


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
        ("reason", job["reason"]),
        ("hint", job["hint"]),
        ("method", job["method"]),
        ("search", job["search"]),
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
        progress = j["progress"]
        rows.append(
            [j["id"], j["name"], j["method"] or j["search"], j["state"], progress["step"], progress["total_steps"]]
        )
        rows[-1] += [j["created_at"][:19], j["reason"]]
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


def logs(job_id: JobId, follow: Annotated[bool, typer.Option("--follow", "-f")] = False) -> None:
    """Prints the log of a job."""
    with connected() as client:
        try:
            for line in client.follow_logs(job_id) if follow else client.logs(job_id).splitlines():
                sys.stdout.write(line + "\n")
                sys.stdout.flush()
        except KeyboardInterrupt:
            raise typer.Exit(OK) from None


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


def events(job_id: JobId, as_json: AsJson = False) -> None:
    """Prints what happened to a job: states, attempts, workers that came and went."""
    with connected() as client:
        found = client.events(job_id)
    if as_json:
        show_json(found)
    else:
        _print_events(found)


def _print_state(found: dict[str, Any], as_json: bool) -> None:
    if as_json:
        show_json(found)
    else:
        out.print(f"{found['id']} {found['state']}")


COMMANDS = (submit, jobs, job, logs, events, metrics, report, pause, resume, cancel)
