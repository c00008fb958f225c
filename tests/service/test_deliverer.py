"""Whatever fails on the way, each event arrives at least once, in the order of its job, under one id."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa
import standardwebhooks.webhooks
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook as Signer

import service.webhook_sender
from service.deliverer import GIVE_UP_S, KEEP_S, LEASE_S, LONGEST_PAUSE_S, Deliverer, pause
from service.principal import LOCAL
from service.settings import Settings
from service.store import Delivery, Job, JobEvent, JobState, Store, Webhook
from service.webhook_sender import Outcome
from service.webhooks import Webhooks

STATES: tuple[JobState, ...] = ("QUEUED", "STARTING", "RUNNING", "SUCCEEDED", "FAILED", "CANCELLED")
URL = "https://hooks.example/manta?key=1"


async def public(host: str, port: int) -> list[str]:
    return ["93.184.216.34"]


class Stage:
    """A database, a receiver that does what it is told, and services that may die."""

    def __init__(self, home: Path) -> None:
        self.settings = Settings(home=home, reconcile_interval_s=3600)
        self.store = Store(self.settings.database)
        self.empty()

    def empty(self) -> None:
        with self.store.session() as session:
            for table in (Delivery, Webhook, JobEvent, Job):
                session.execute(sa.delete(table))
        self.now = 1_000_000.0
        self.answers: list[str] = []  # what the receiver does next; afterwards it is well
        self.got: list[httpx.Request] = []  # what it accepted
        self.jobs = 0
        self.hooks = Webhooks(self.settings, self.store, lambda: self.now, public)
        self.services = [self.service() for _ in range(2)]

    def service(self) -> Deliverer:
        transport = httpx.MockTransport(self.receive)
        return Deliverer(self.settings, self.store, lambda: self.now, transport=transport, find=public)

    def receive(self, request: httpx.Request) -> httpx.Response:
        answer = self.answers.pop(0) if self.answers else "200"
        if answer == "down":
            raise httpx.ConnectError("refused")
        if answer == "slow":
            raise httpx.ReadTimeout("nothing came")
        if answer in ("200", "lost"):
            self.got.append(request)
        if answer == "lost":
            raise httpx.RemoteProtocolError("it broke off")
        return httpx.Response(int(answer), headers={"Location": "https://elsewhere.example"})

    def hook(self, states: tuple[JobState, ...] = STATES) -> Webhook:
        return self.hooks.create(LOCAL, "default", URL, [*states])

    def job(self, project: str = "default") -> int:
        self.jobs += 1
        with self.store.session() as session:
            job = Job(id=f"job-{self.jobs}", name="n", spec={}, origin="rest", project=project)
            job.become("QUEUED", "accepted")
            session.add(job)
        return job.number

    def become(self, number: int, state: JobState) -> None:
        with self.store.session() as session:
            row = session.get(Job, number)
            assert row is not None
            row.become(state, f"it is {state}")

    def turn(self, rounds: int = 1) -> None:
        for _ in range(rounds):
            self.services[0].round()

    def crash(self, sent: bool) -> None:
        """A service claims, perhaps sends, and dies before it writes what came of it."""
        dying = self.services[1]
        dying._fan_out()
        claims = dying._claim()
        if sent and claims:
            dying._sender.send([claim.message for claim in claims])

    def settle(self) -> None:
        """The receiver is well, and time goes by."""
        self.answers = []
        for _ in range(200):
            self.now += 3700
            self.services[0].round()
            with self.store.session() as session:
                waiting = session.scalar(sa.select(sa.func.count()).where(Delivery.state == "PENDING"))
            if not waiting:
                return
        raise AssertionError("not all was delivered")

    def accepted(self) -> list[tuple[str, dict[str, Any]]]:
        return [(request.headers["webhook-id"], json.loads(request.content)) for request in self.got]

    def row(self, hook: Webhook) -> Webhook:
        return self.hooks.get(hook.id)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """Migrated once for the file."""
    stage = Stage(tmp_path_factory.mktemp("hooks"))
    yield stage
    stage.store.close()


@pytest.fixture
def stage(shared: Stage) -> Stage:
    shared.empty()
    return shared


event = st.tuples(st.just("event"), st.integers(0, 2), st.sampled_from(STATES[1:]))
fault = st.tuples(st.just("fault"), st.sampled_from(("500", "down", "slow", "lost", "302", "429")))
step = st.one_of(
    event,
    event,
    fault,
    st.tuples(st.just("crash"), st.booleans()),
    st.tuples(st.just("round"), st.integers(0, 1)),
    st.tuples(st.just("wait"), st.sampled_from((1.0, 10.0, LEASE_S + 1, 4000.0))),
)


@given(st.lists(step, min_size=1, max_size=40))
@settings(max_examples=25)
def test_each_event_arrives_in_the_order_of_its_job_whatever_fails(shared: Stage, steps: list[Any]) -> None:
    stage = shared
    stage.empty()
    stage.hook()
    jobs = [stage.job() for _ in range(3)]
    for kind, *what in steps:
        if kind == "event":
            stage.become(jobs[what[0]], what[1])
        elif kind == "fault":
            stage.answers.append(what[0])
        elif kind == "crash":
            stage.crash(sent=what[0])
        elif kind == "round":
            stage.services[what[0]].round()
        else:
            stage.now += what[0]
    stage.settle()

    first: dict[str, dict[str, Any]] = {}
    for message_id, document in stage.accepted():
        assert first.setdefault(message_id, document) == document  # sent again, it is the same
    with stage.store.session() as session:
        query = sa.select(Job.id, JobEvent.kind, JobEvent.message).join(Job, Job.number == JobEvent.job_number)
        events = [tuple(row) for row in session.execute(query.order_by(JobEvent.id))]
    for job in {event[0] for event in events}:
        arrived = [
            (document["data"]["id"], document["data"]["state"].lower(), document["data"]["message"])
            for document in first.values()
            if document["data"]["id"] == job
        ]
        assert arrived == [event for event in events if event[0] == job]
    assert len(first) == len(events)


def test_a_message_and_its_signature(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = stage.hook()
    stage.job()
    stage.turn()
    (request,) = stage.got
    # to the address that was looked at, under the name of the host
    assert str(request.url) == "https://93.184.216.34/manta?key=1" and request.headers["host"] == "hooks.example"
    assert request.extensions["sni_hostname"] == "hooks.example"

    class Then(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.fromtimestamp(stage.now, tz)

    monkeypatch.setattr(standardwebhooks.webhooks, "datetime", Then)
    document = Signer(hook.secret).verify(request.content, dict(request.headers))
    happened = datetime.fromisoformat(document.pop("timestamp"))
    assert happened.tzinfo is not None
    data = {"id": "job-1", "name": "n", "project": "default", "owner": "local"}
    assert document == {"type": "job.queued", "data": data | {"state": "QUEUED", "message": "accepted"}}
    with pytest.raises(standardwebhooks.webhooks.WebhookVerificationError):
        Signer(hook.secret).verify(request.content + b" ", dict(request.headers))


def test_a_webhook_is_told_of_its_project_and_states_from_now_on(stage: Stage) -> None:
    before = stage.job()
    stage.turn()
    stage.hook(("FAILED",))
    other = stage.job("two")
    for number, state in ((before, "RUNNING"), (before, "FAILED"), (other, "FAILED")):
        stage.become(number, state)  # type: ignore[arg-type]
    stage.turn(3)
    assert [document["type"] for _, document in stage.accepted()] == ["job.failed"]


def test_an_event_that_commits_late_is_not_passed_by(stage: Stage) -> None:
    """Two transactions take ids in one order and commit in the other: no cursor could see that."""
    stage.hook()
    number = stage.job()
    with stage.store.session() as session:
        session.execute(sa.insert(JobEvent).values(id=1001, job_number=number, kind="failed", message="b"))
    stage.turn(2)
    with stage.store.session() as session:
        session.execute(sa.insert(JobEvent).values(id=1000, job_number=number, kind="running", message="a"))
    stage.turn(2)
    assert [document["data"]["message"] for _, document in stage.accepted()] == ["accepted", "b", "a"]


def test_a_failing_job_does_not_hold_up_others_nor_one_webhook_the_rest(stage: Stage) -> None:
    stage.hook()
    first, second = stage.job(), stage.job()
    stage.answers = ["500", "200"]
    stage.turn()  # the first event of `first` fails
    stage.become(first, "RUNNING")
    stage.become(second, "RUNNING")
    stage.turn()
    assert [(d["data"]["id"], d["type"]) for _, d in stage.accepted()] == [
        ("job-2", "job.queued"),
        ("job-2", "job.running"),
    ]
    stage.now += 10
    stage.turn(2)
    assert [d["type"] for _, d in stage.accepted()[2:]] == ["job.queued", "job.running"]


def test_two_services_send_a_delivery_once(stage: Stage) -> None:
    stage.hook()
    stage.job()
    for one in stage.services:
        one._fan_out()
    claims = [one._claim() for one in stage.services]
    assert [len(some) for some in claims] == [1, 0]
    stage.now += LEASE_S + 1  # the first one hangs: the second takes over, and the first has nothing more to say
    (again,) = stage.services[1]._claim()
    stage.services[1]._settle(again, Outcome(200))
    stage.services[0]._settle(claims[0][0], Outcome(error="late"))
    with stage.store.session() as session:
        row = session.scalars(sa.select(Delivery)).one()
        assert (row.state, row.attempts, row.error) == ("DELIVERED", 2, None)


def test_pauses_grow_to_an_hour() -> None:
    class Middle:
        def uniform(self, low: float, high: float) -> float:
            return (low + high) / 2

    assert [pause(n, Middle()) for n in (1, 2, 3, 10, 11, 1000)] == [5, 10, 20, 2560, 3600, 3600]  # type: ignore[arg-type]


def test_who_accepts_nothing_for_three_days_is_disabled_until_a_ping_arrives(stage: Stage) -> None:
    hook = stage.hook()
    number = stage.job()
    began = stage.now
    while stage.row(hook).disabled_at is None:
        assert stage.now < began + GIVE_UP_S + 3 * LONGEST_PAUSE_S  # the last pause, half longer, and a step
        stage.answers = ["500"]
        stage.turn()
        stage.now += 3700
    reason = stage.row(hook).reason
    assert reason is not None and reason.startswith("accepted nothing since 1970-01-12") and "got 500" in reason
    stage.become(number, "RUNNING")
    stage.turn(2)
    assert stage.got == []
    stage.hooks.test(hook.id)
    stage.answers = ["500"]
    stage.turn()
    assert stage.row(hook).disabled_at is not None and stage.hooks.deliveries(hook.id, limit=1)[0]["state"] == "FAILED"
    stage.hooks.test(hook.id)
    stage.turn()
    assert (stage.row(hook).disabled_at, stage.row(hook).reason) == (None, None)
    stage.become(number, "FAILED")
    stage.turn()
    assert [document["type"] for _, document in stage.accepted()] == ["webhook.ping", "job.failed"]


def test_one_event_that_is_never_accepted_is_given_up_alone(stage: Stage) -> None:
    hook = stage.hook()
    stage.job()
    stage.answers = ["400"]
    stage.turn()
    stage.job()
    stage.turn()  # of the second job: accepted
    while (row := stage.hooks.deliveries(hook.id, limit=9)[-1])["state"] == "PENDING":
        stage.now += 3700
        stage.answers = ["400"]
        stage.turn()
    assert (row["state"], row["status"], row["error"]) == ("FAILED", 400, "got 400, expected 2xx")
    assert stage.row(hook).disabled_at is None
    stage.now += KEEP_S + 1
    stage.turn()
    assert stage.hooks.deliveries(hook.id, limit=9) == []


def test_gone_is_for_good_and_redirects_are_not_followed(stage: Stage) -> None:
    hook = stage.hook()
    stage.job()
    stage.answers = ["307", "410"]
    stage.turn()
    (row,) = stage.hooks.deliveries(hook.id, limit=9)
    assert row["state"] == "PENDING" and row["error"] == "got 307, expected 2xx; redirects are not followed"
    stage.now += 10
    stage.turn()
    assert stage.row(hook).disabled_at == stage.now


def test_a_name_that_turns_private_is_not_asked(stage: Stage) -> None:
    hook = stage.hook()
    stage.job()

    async def rebound(host: str, port: int) -> list[str]:
        return ["93.184.216.34", "169.254.169.254"]

    stage.services[0]._sender._find = rebound
    stage.turn()
    assert stage.got == [] and "all public" in str(stage.hooks.deliveries(hook.id, limit=1)[0]["error"])


def test_a_second_address_is_tried(stage: Stage) -> None:
    stage.hook()
    stage.job()

    async def two(host: str, port: int) -> list[str]:
        return ["2606:4700::1111", "93.184.216.34"]

    stage.services[0]._sender._find = two
    stage.answers = ["down", "200"]
    stage.turn()
    assert [request.url.host for request in stage.got] == ["93.184.216.34"]


def test_a_receiver_that_never_answers_is_left(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    hook = stage.hook()
    stage.job()

    timeouts: list[dict[str, float | None]] = []

    async def never(request: httpx.Request) -> httpx.Response:
        timeouts.append(request.extensions["timeout"])
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(service.webhook_sender, "DEADLINE_S", 0.01)
    stage.services[0]._sender._transport = httpx.MockTransport(never)
    stage.turn()
    assert stage.hooks.deliveries(hook.id, limit=1)[0]["error"] == "no answer in 0.01 s"
    assert [{*limits.values()} for limits in timeouts] == [{None}]  # nothing ends it sooner: httpx would after 5 s


def test_the_thread_stops_in_the_middle_of_a_request(stage: Stage) -> None:
    stage.hook()
    stage.job()
    reached = threading.Event()

    async def never(request: httpx.Request) -> httpx.Response:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    deliverer = stage.services[0]
    deliverer._sender._transport = httpx.MockTransport(never)
    deliverer.start()
    assert reached.wait(10)
    deliverer.stop()
    assert not deliverer._thread.is_alive()
    stage.now += LEASE_S + 1
    stage.services[1].round()
    assert len(stage.got) == 1


class Endless(BaseHTTPRequestHandler):
    """Accepts, and then talks until nobody listens."""

    def do_POST(self) -> None:
        self.server.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))  # type: ignore[attr-defined]
        self.send_response(200)
        self.end_headers()
        try:
            while True:
                self.wfile.write(b"x" * 65536)
        except OSError:
            pass

    def log_message(self, *_: object) -> None:
        pass


def test_over_a_real_socket_the_body_of_the_answer_is_not_read(stage: Stage) -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    server.bodies = []  # type: ignore[attr-defined]
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        allowed = stage.settings.model_copy(update={"webhook_hosts": ("127.0.0.1",)})
        url = f"http://127.0.0.1:{server.server_port}/x"
        hook = Webhooks(allowed, stage.store, lambda: stage.now).create(LOCAL, "default", url, ["QUEUED"])
        stage.job()
        Deliverer(allowed, stage.store, lambda: stage.now).round()
        assert stage.hooks.deliveries(hook.id, limit=1)[0]["state"] == "DELIVERED"
        assert [json.loads(body)["type"] for body in server.bodies] == ["job.queued"]  # type: ignore[attr-defined]
    finally:
        server.shutdown()
        server.server_close()
