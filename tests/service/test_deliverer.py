"""Whatever fails on the way, each event arrives at least once, in the order of its job, under one id."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import pytest
import sqlalchemy as sa
import standardwebhooks.webhooks
from hypothesis import given, settings
from hypothesis import strategies as st
from standardwebhooks import Webhook as Signer

from service.deliverer import GIVE_UP_S, KEEP_S, LEASE_S, LONGEST_PAUSE_S, pause
from service.store import Delivery, Job, JobEvent
from service.webhook_sender import Outcome
from tests.service.receivers import STATES, Stage

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
def test_each_event_arrives_in_the_order_of_its_job_whatever_fails(shared_stage: Stage, steps: list[Any]) -> None:
    stage = shared_stage
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
