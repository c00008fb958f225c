"""Checks of jobs that were held until others had succeeded: made by a few threads, so that the reconciler never waits.

An object store that does not answer holds up the jobs that read from it, and nobody else. A check that could not be
made is made again after a growing pause, and after `service.decisions.MAX_CHECKS` of them the job fails.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from service.decisions import CHECKING, Decision, check_pause_s, checked, unchecked
from service.roots import ANY, Kind, Roots
from service.store import Job
from workloads.log_lines import about
from workloads.preflight import Check, Problem
from workloads.spec_any import parse_spec

THREADS = 8


@dataclass
class _Tries:
    """Checks of one spec; `found` is the newest, None in the pause after one that could not be made."""

    spec: Mapping[str, Any]
    number: int = 0
    failed_at: float = 0.0
    found: Future[list[Problem]] | None = None


class Checks:
    """For one thread, which asks in each of its rounds."""

    def __init__(
        self,
        check: Check,
        home: Path,
        readable: Callable[[str, str, float], bool],
        clock: Callable[[], float],
        wake: Callable[[], None],
        pool: Executor | None = None,
    ) -> None:
        """Keeps its parts.

        Args:
            check: what is wrong with a spec.
            home: of the installation.
            readable: whether a job may read a model; by its name, and the job's project and time of submission.
            clock: seconds since the epoch.
            wake: called when a check is over.
            pool: runs the checks; default: threads.
        """
        self._check, self._clock, self._wake = check, clock, wake
        self._home, self._readable, self._roots = home, readable, Roots((ANY,), (ANY,), home)
        self._pool = pool or ThreadPoolExecutor(THREADS, thread_name_prefix="check")
        self._tries: dict[str, _Tries] = {}

    def decide(self, job: Job) -> Decision:
        """What is known of the job's check by now; it is begun where none is under way."""
        tries = self._tries.get(job.id)
        if tries is None or tries.spec != job.spec:
            tries = self._tries[job.id] = _Tries(job.spec)
        if tries.found is None:
            waited = self._clock() - tries.failed_at
            if 0 <= waited < check_pause_s(tries.number):  # below 0: the clock was put back
                return Decision("none", job.state, job.reason)
            tries.number += 1
            tries.found = self._pool.submit(self._look, job.id, job.project, job.created_at, job.spec)
            tries.found.add_done_callback(lambda _: self._wake())
        if not tries.found.done():
            return Decision("none", job.state, CHECKING)
        error = tries.found.exception()
        decision = unchecked(job.id, error, tries.number) if error else checked(tries.found.result())
        tries.found, tries.failed_at = None, self._clock()
        if decision.act != "none":
            del self._tries[job.id]
        return decision

    def keep(self, job_ids: Collection[str]) -> None:
        """Forgets the others: nobody waits for them any more."""
        for job_id in self._tries.keys() - set(job_ids):
            found = self._tries.pop(job_id).found
            if found is not None:
                found.cancel()

    def close(self) -> None:
        """Begins no more; one under way ends by itself."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _look(self, job_id: str, project: str, since: float, document: dict[str, Any]) -> list[Problem]:
        """Names that were nobody's when the job was accepted may be another project's by now.

        They are looked at last, so that none is registered in between, and told first.
        """

        def readable(kind: Kind, name: str) -> bool:
            return kind != "model" or self._readable(name, project, since)  # the rest was refused at once

        with about(job_id=job_id, project=project):
            spec = parse_spec(document)
            found = self._check(spec, self._home)
            return self._roots.problems(spec, readable) or found
