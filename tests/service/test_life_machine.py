"""Whatever users, Ray, runs, clocks and crashes do to jobs: a search for an order that makes one of them untrue."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from service.errors import Conflict, InvalidSpec
from service.ray_jobs import submission_id
from service.store import SETTLED, TERMINAL, Job, Store
from tests.service.lives import AHEAD_S, Crash, LyingRay, Runs
from tests.service.world import BODY, World

SOME = st.integers(0, 5)  # of the jobs, or processes, that there are
FUSE = st.none() | st.integers(0, 12)  # commits and calls of Ray until the service is killed
PRIORITIES = {"a": "low", "b": "normal", "c": "high", "d": "high"}  # by idempotency key
VERBS = ("cancel", "pause", "resume", "retry")
WAYS = ("work", "work", "SUCCEEDED", "FAILED", "late", "die", "silent")
ROUNDS = 30  # of 100 s, in which all settles once there is peace: less than a clock may be wrong


class Life(RuleBasedStateMachine):
    """What the service is compared with: the jobs it accepted, what was asked of them, what their runs really did."""

    template: Path  # a database that is migrated

    def __init__(self) -> None:
        super().__init__()
        self.home = Path(tempfile.mkdtemp(prefix="life-"))
        shutil.copytree(self.template, self.home, dirs_exist_ok=True)
        self.fuse: int | None = None
        self.meanwhile: tuple[int, str] | None = None
        self.ray = LyingRay(self.point, self.between, self.started)
        self.world = World(self.home, max_attempts=3, preemption=True)
        self.world.ray = self.ray
        self.runs = Runs(self.ray, lambda job_id: self.world.settings.runs / job_id, self.world.clock)
        self.restart()
        self.keys: dict[str, str] = {}
        self.jobs: list[str] = []
        self.asked: dict[str, set[str]] = {}  # by job: what users asked since it last came into the queue
        self.since: dict[str, int] = {}  # by job: its attempt when it last made progress or came into the queue
        self.best: dict[str, int] = {}
        self.over: dict[str, Any] = {}  # by job: how it ended, until it is retried
        self.skew = 0.0
        self.submitted: set[tuple[int, str, int]] = set()

    def restart(self) -> None:
        self.world.store.close()
        self.world.restart()
        sa.event.listen(self.world.store.engine, "commit", self.point)
        sa.event.listen(self.world.store._sessions, "after_commit", self.point)

    def point(self, *_: object) -> None:
        """Between two statements: the service dies here when its fuse has burnt down."""
        if self.fuse is not None:
            self.fuse -= 1
            if self.fuse < 0:
                self.fuse = None
                raise Crash

    def between(self) -> None:
        """The reconciler asks Ray, which takes time: a user asks something of a job."""
        request, self.meanwhile = self.meanwhile, None
        if request is not None:
            fuse, self.fuse = self.fuse, None  # the crash is that of the reconciler
            self.asks(*request)
            self.fuse = fuse

    def started(self, job_id: str, attempt: int) -> None:
        """Ray starts a process."""
        names = [submission_id(job_id, n) for n in range(1, attempt)]
        assert all(self.ray.known.get(name) not in ("PENDING", "RUNNING") for name in names), "an attempt still runs"
        fresh = self.ray.known.pop(submission_id(job_id, attempt))  # it was not there before this submission
        assert not self.runs.known(job_id), "a run is at work"
        assert not self.runs.has_succeeded(job_id), "it has succeeded"
        self.ray.known[submission_id(job_id, attempt)] = fresh
        assert (self.runs.life, job_id, attempt) not in self.submitted, "an attempt is started twice"
        self.submitted.add((self.runs.life, job_id, attempt))
        self.runs.start(job_id, attempt, self.skew)

    @contextlib.contextmanager
    def crashes(self, fuse: int | None) -> Any:
        """The block, in which the service may die; then it is started again."""
        self.fuse = fuse
        try:
            yield
        except Crash:
            self.restart()
        finally:
            self.fuse = None

    def row(self, job_id: str) -> Job:
        return self.world.jobs.get(job_id)

    # Users

    @initialize(cpus=st.sampled_from([1, 1, 3]))
    def first(self, cpus: int) -> None:
        self.ray.cpus = cpus
        self.submit("a", None)

    @rule(key=st.sampled_from(list(PRIORITIES)), fuse=FUSE)
    def submit(self, key: str, fuse: int | None) -> None:
        """A second time with the same key it is the same job."""
        with self.crashes(fuse):
            job, created = self.world.submissions.submit(BODY | {"priority": PRIORITIES[key]}, key)
            assert created == (job.id not in self.jobs)
            assert self.keys.setdefault(key, job.id) == job.id
            if created:
                self.accepted(job.id)

    def accepted(self, job_id: str) -> None:
        self.jobs.append(job_id)
        self.asked[job_id], self.since[job_id], self.best[job_id] = set(), 0, 0

    @precondition(lambda self: len(self.jobs) < 6)
    @rule(n=SOME, clone=st.booleans())
    def another(self, n: int, clone: bool) -> None:
        """A copy of a job, or one that comes after it."""
        job_id = self.jobs[n % len(self.jobs)]
        accepts = self.world.submissions
        with contextlib.suppress(InvalidSpec):  # what it comes after has failed
            job, _ = (
                accepts.clone(job_id, {"priority": "high"}) if clone else accepts.submit(BODY | {"after": [job_id]})
            )
            self.accepted(job.id)

    @rule(n=SOME, verb=st.sampled_from(VERBS), fuse=FUSE)
    def ask(self, n: int, verb: str, fuse: int | None) -> None:
        with self.crashes(fuse):
            self.asks(n, verb)

    def asks(self, n: int, verb: str) -> None:
        job_id = self.jobs[n % len(self.jobs)]
        before = self.row(job_id)
        try:
            with contextlib.suppress(Conflict):
                getattr(self.world.jobs, verb)(job_id)
        finally:
            self.fuse = None
            self.was_asked(before, verb)

    def was_asked(self, before: Job, verb: str) -> None:
        job_id = before.id
        after = self.row(job_id)
        if (after.state, after.gives_way) == (before.state, before.gives_way):
            return
        if verb in ("resume", "retry"):
            assert before.state in SETTLED and after.state == "QUEUED"
            self.over.pop(job_id, None)
            self.asked[job_id], self.since[job_id] = set(), after.attempt
        self.asked[job_id].add(verb)

    # The service

    @rule(fuse=FUSE, meanwhile=st.none() | st.tuples(SOME, st.sampled_from(VERBS)))
    def look(self, fuse: int | None, meanwhile: tuple[int, str] | None = None) -> None:
        self.meanwhile = meanwhile
        with self.crashes(fuse):
            self.world.reconciler.round()
        self.meanwhile = None

    @rule(fuse=FUSE, seconds=st.sampled_from([1, 15, 25]))
    def time_passes(self, fuse: int | None, seconds: int) -> None:
        self.world.now += seconds
        self.runs.clock_moved()
        self.look(fuse)

    @rule(seconds=st.sampled_from([-AHEAD_S, AHEAD_S]))
    def the_clock_is_set(self, seconds: float) -> None:
        self.world.now += seconds
        for process in self.runs.living():
            process.beat = None if process.beat is None else process.beat + seconds  # the same moment, told anew
        self.runs.clock_moved()

    # Ray

    @rule(away=st.booleans(), refuses=st.booleans(), loses=st.booleans(), skewed=st.booleans())
    def ray_behaves(self, away: bool, refuses: bool, loses: bool, skewed: bool) -> None:
        self.ray.away, self.ray.refuse_submit, self.ray.loses_answer = away, refuses, loses
        self.skew = AHEAD_S * skewed

    @rule(survive=st.booleans())
    def the_head_is_killed(self, survive: bool) -> None:
        self.runs.new_head(lambda: survive)

    @precondition(lambda self: self.runs.living())
    @rule(n=SOME)
    def ray_calls_it_failed(self, n: int) -> None:
        process = self.runs.living()[n % len(self.runs.living())]
        name = submission_id(process.job_id, process.attempt)
        if name in self.ray.known and process.beat is not None:
            self.ray.known[name] = "FAILED"

    # Runs

    @precondition(lambda self: self.runs.living())
    @rule(n=SOME, way=st.sampled_from(WAYS))
    def a_run_goes_on(self, n: int, way: str) -> None:
        process = self.runs.living()[n % len(self.runs.living())]
        self.runs.turn(process, way)
        if process.step > self.best[process.job_id]:
            self.best[process.job_id] = process.step
            self.since[process.job_id] = max(self.since[process.job_id], process.attempt)

    # What is true

    @invariant()
    def the_table_has_what_was_accepted(self) -> None:
        with self.world.store.session() as session:
            rows = {job.id: job for job in session.scalars(sa.select(Job))}
        unanswered = rows.keys() - set(self.jobs)  # accepted, but the service died before it could say so
        for job_id in unanswered:
            assert rows[job_id].idempotency_key not in self.keys
            self.accepted(job_id)
        assert rows.keys() == set(self.jobs)
        for job in rows.values():
            self.ended_truly(job)
        for process in self.runs.living():
            job = rows[process.job_id]
            if job.state == "QUEUED" or (job.state in SETTLED and job.state != "SUCCEEDED"):
                assert (self.world.folder(job) / "stop").exists(), "nobody stops a run that is not at work for us"

    def ended_truly(self, job: Job) -> None:
        told = (job.state, job.reason, job.hint, job.finished_at, job.attempt)
        if job.id in self.over:
            assert told == self.over[job.id], "what is over changed"
        elif job.state in TERMINAL:
            self.over[job.id] = told
            words = self.runs.wrote.get(job.id, [])
            if job.state == "SUCCEEDED":
                assert "SUCCEEDED" in [word.state for word in words]
            elif job.state == "CANCELLED":
                assert "cancel" in self.asked[job.id]
            elif (reason := job.reason or "").startswith("ended"):
                assert job.attempt - self.since[job.id] >= self.world.settings.max_attempts, "it made progress"
            elif "which it comes after" not in reason:
                assert reason in [word.reason for word in words if word.state == "FAILED"]
        elif job.state == "PAUSED":
            assert "pause" in self.asked[job.id]

    def teardown(self) -> None:
        """Peace: Ray answers, processes end, and within a bounded number of rounds nothing is left to be done."""
        try:
            self.ray.away = self.ray.refuse_submit = self.ray.loses_answer = False
            for _ in range(ROUNDS):
                self.world.now += 100
                self.runs.clock_moved()
                self.world.reconciler.round()
                self.the_table_has_what_was_accepted()
                for process in self.runs.living():
                    self.runs.turn(process, "SUCCEEDED")
                if not self.runs.living() and all(self.row(job_id).state in SETTLED for job_id in self.jobs):
                    break
            for job_id in self.jobs:
                self.settled(self.row(job_id))
        finally:
            self.world.store.close()
            shutil.rmtree(self.home)

    def settled(self, job: Job) -> None:
        waits = [parent for parent in job.after if self.row(parent).state == "PAUSED"]
        assert job.state in SETTLED or (job.state == "QUEUED" and (waits or self.held_up(job))), job.state
        events = self.world.jobs.events(job.id)
        starts = [event["message"] for event in events if event["kind"] == "starting"]
        assert starts == [f"attempt {n + 1}" for n in range(job.attempt)]
        assert events[0]["kind"] == "queued" and events[-1]["kind"] == job.state.lower()

    def held_up(self, job: Job) -> bool:
        """Whether it comes, over others, after one that is paused."""
        return any(self.row(parent).state == "PAUSED" or self.held_up(self.row(parent)) for parent in job.after)


def test_no_order_of_events_makes_a_job_untrue(tmp_path_factory: pytest.TempPathFactory) -> None:
    from hypothesis.stateful import run_state_machine_as_test

    Life.template = tmp_path_factory.mktemp("template")
    Store(f"sqlite:///{Life.template / 'manta.db'}").close()
    run_state_machine_as_test(Life, settings=settings(max_examples=16, stateful_step_count=40))
