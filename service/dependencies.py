"""What a job comes after: the jobs of its `after`, and those whose weights or architecture it names as `job:<id>`.

Such a job is accepted at once and held in the queue until all of them have succeeded. Then it is checked once more,
since what it names is there only now. One of them that fails or is cancelled fails it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from service.errors import InvalidSpec
from service.roots import texts
from service.store import JobState
from workloads.preflight import Problem
from workloads.spec_any import AnySpec
from workloads.spec_deploy import DeploySpec

MARK = "job:"
OPEN_HINT = "`$name` means an earlier entry of the same list: POST /v1/jobs:batch, or several files of `manta submit`"


def references(spec: AnySpec | DeploySpec) -> list[str]:
    """Jobs whose results the spec names, wherever it does."""
    found = (text.removeprefix(MARK) for _, text in texts(spec.model_dump(mode="json"), []) if text.startswith(MARK))
    return list(dict.fromkeys(found))


def waits_for(states: Mapping[str, JobState | None]) -> list[str]:
    """Those of the jobs that have not succeeded."""
    return [job_id for job_id, state in states.items() if state != "SUCCEEDED"]


def lost(states: Mapping[str, JobState | None]) -> tuple[str, str] | None:
    """(reason, hint) once one of the jobs will not succeed by itself; None for one that is not there any more."""
    for job_id, state in states.items():
        if state in ("FAILED", "CANCELLED"):
            return f"{job_id}, which it comes after, is {state}", f"`manta retry {job_id}`, then retry this one"
        if state is None:
            return f"{job_id}, which it comes after, does not exist any more", "clone it without this one"
    return None


def waiting(job_ids: Sequence[str]) -> str:
    """The reason of a job that is held."""
    return f"waits for {', '.join(job_ids)}"


def named(documents: Sequence[dict[str, Any]], ids: Sequence[str]) -> list[dict[str, Any]]:
    """The documents with `$name` in `after`, and `job:$name` anywhere, replaced by the id of the earlier entry.

    A name is that of an entry's own `name`. Only earlier entries can be named, so there are no cycles.

    Args:
        documents: jobs, as they were sent.
        ids: of the jobs that they become.

    Raises:
        InvalidSpec: a name of no earlier entry, or of two of them; `loc` begins with `jobs` and the number of the
            entry where there are several.
    """
    earlier: dict[str, list[str]] = {}
    problems: list[Problem] = []
    found = []
    for i, (document, job_id) in enumerate(zip(documents, ids, strict=True)):
        found.append(_replaced(document, ["jobs", i] if len(documents) > 1 else [], earlier, problems))
        if isinstance(name := document.get("name"), str):
            earlier.setdefault(name, []).append(job_id)
    if problems:
        raise InvalidSpec([problem.model_dump() for problem in problems])
    return found


def _replaced(value: Any, loc: list[str | int], earlier: dict[str, list[str]], problems: list[Problem]) -> Any:
    """A part of a document, at `loc`, with the names in it replaced; `problems` takes those that name nothing."""
    if isinstance(value, dict):
        return {key: _replaced(one, [*loc, key], earlier, problems) for key, one in value.items()}
    if isinstance(value, list):
        return [_replaced(one, [*loc, i], earlier, problems) for i, one in enumerate(value)]
    if not isinstance(value, str) or not value.startswith("$" if "after" in loc else f"{MARK}$"):
        return value
    mark, _, name = value.partition("$")
    known = earlier.get(name, [])
    if len(known) == 1:
        return mark + known[0]
    some = f"{len(known)} earlier entries" if known else "no earlier entry of a list"
    among = f", expected one of {', '.join(earlier)}" if earlier else ""
    problems.append(Problem(loc=loc, message=f"got ${name}, which names {some}{among}", hint=OPEN_HINT))
    return value
