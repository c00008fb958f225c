"""The OpenAPI document against the service: schemathesis asks every operation everything it can think of.

    python -m tests.service.contract --minutes 10      # further than the suite goes; another seed each time

The service is a whole one in this process, with real checks of jobs, over a Ray and a Serve that are played.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args
from unittest import mock

import schemathesis
import sqlalchemy as sa
from schemathesis.engine import events, from_schema
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service import streams
from service.errors import NotDeployed
from service.principal import LOCAL
from service.store import Deployment, Job, JobState
from service.tokens import no_such_token
from tests.service.fakes import write_record
from tests.service.secured import NoServe, Secured
from tests.toy import TOY_MAE, TOY_MODEL, write_shards
from tests.toy_search import toy_search
from workloads import preflight

OUTPUTS: dict[str, Any] = {
    "predict": {"label": "7", "index": 7, "probabilities": {"7": 0.9}},
    "embed": [0.5, -0.5],
    "reconstruct": {"original": "iVBOR"},
}


RESULT = {
    "name": "knn",
    "label": "knn",
    "config": {},
    "metric": "accuracy",
    "results": {"model": {"mean": 0.5, "std": 0.0, "seeds": [0.5]}},
}


ONLINE = {
    "step": 10,
    "epoch": 1,
    "entry": 0,
    "label": "knn",
    "metric": "accuracy",
    "mean": 0.5,
    "std": 0.0,
    "seeds": [0.5],
}
STATES = get_args(JobState)


class Handle:
    """Answers every image alike."""

    def options(self, method_name: str) -> Any:
        async def remote(images: list[bytes]) -> dict[str, Any]:
            return {"model": "digits@1", "outputs": [OUTPUTS[method_name]] * len(images)}

        return SimpleNamespace(remote=remote)


class Serve(NoServe):
    """Serves `digits`, and whatever is deployed."""

    def __init__(self) -> None:
        self.served = {"digits": 1}
        self.registry: Any = None

    async def handle(self, name: str) -> Any:
        self.registry.get(name)
        if name not in self.served:
            raise NotDeployed(f"{name} is not deployed", "deploy it")
        return Handle()

    def view(self, name: str) -> Any:
        state = {"model": f"{name}@{self.served.get(name)}", "state": "RUNNING", "reason": None}
        return state if name in self.served else None

    def deploy(self, name: str, version: int | None) -> Deployment:
        self.served[name] = self.registry.get(name, version).version
        return Deployment(name=name, version=self.served[name], state="DEPLOYING")

    def wait(self, name: str, timeout_s: float) -> Deployment:
        return Deployment(name=name, version=self.served[name], state="RUNNING")

    def undeploy(self, name: str) -> None:
        self.registry.get(name)
        if self.served.pop(name, None) is None:
            raise NotDeployed(f"{name} is not deployed", "deploy it")


class Contracted(Secured):
    """With jobs in all states, models of which one is served, two projects, and a token that nobody can revoke."""

    def __init__(self, home: Path) -> None:
        serve = Serve()
        fast: dict[str, Any] = {"requests_per_s": 1e9, "request_burst": 10**9}
        super().__init__(home, preflight.check, serve, str(home), **fast)
        serve.registry = self.parts.registry
        self.now = time.time()
        sa.event.listen(self.store.engine, "connect", _without_fsync)
        self.store.engine.dispose()
        self.project("other")
        root, self.root = self.parts.tokens.create(LOCAL, "root", "admin", "*", None)
        revoke = self.parts.tokens.revoke

        def revoke_others(by: Any, token_id: str) -> Any:
            if token_id == root.id:
                raise no_such_token(token_id)
            return revoke(by, token_id)

        self.parts.tokens.revoke = revoke_others  # type: ignore[method-assign]
        self.token("ann", "submitter", "other")
        self.model("digits")
        self.model("letters", "other")
        (home / "data").mkdir()
        self._jobs(write_shards(home / "data", "train", 80, 3))

    def _jobs(self, shards: str) -> None:
        data = {"train": {"shards": shards}}
        body = {"name": "toy", "method": TOY_MAE, "model": TOY_MODEL, "data": data, "epochs": 1, "batch_size": 8}
        for state in (*STATES, "search"):
            document = toy_search().model_dump(mode="json") if state == "search" else body
            job, _ = self.parts.submissions.submit(document)
            if state in ("QUEUED", "search"):
                continue
            with self.store.session() as session:
                row = session.get(Job, job.number)
                assert row is not None
                row.become(state, "as the test wants it")
            folder = self.settings.runs / job.id
            write_record(folder, "RUNNING", step=20, ran_s=3.0, warnings=["one"])
            points = ({"step": step, "epoch": 0, "loss": 1.0 / step, "lr": 0.1} for step in range(1, 20))
            (folder / "metrics.jsonl").write_text("".join(json.dumps(point) + "\n" for point in points))
            (folder / "log.txt").write_text("2026-01-01 00:00:00,000 INFO [rank 0] x: first\nsecond\n")
            (folder / "events.jsonl").write_text('{"time": 1.0, "kind": "hang", "message": "m"}\n')
            (folder / "evaluations.json").write_text(json.dumps([RESULT]))
            (folder / "online.jsonl").write_text(json.dumps(ONLINE) + "\n")


def _without_fsync(connection: Any, _: Any) -> None:
    connection.execute("PRAGMA synchronous=OFF")


def answering(app: ASGIApp) -> ASGIApp:
    """The app as a server runs it: what it raises beside an answer of 500 goes to the log."""

    async def served(scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def sending(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await app(scope, receive, sending)
        except Exception:
            if not began:
                raise

    return served


CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "allow_header_conformance",
    "ignored_auth",
    "use_after_free",
)


def failures(
    service: Contracted, *, examples: int, seed: int, seconds: int | None = None
) -> tuple[Counter[str], Counter[str]]:
    """Runs all phases of schemathesis, one request at a time.

    Args:
        service: what is asked.
        examples: of each operation, in the phases that draw at random.
        seed: of these.
        seconds: go on for so long; None: one pass.

    Returns:
        What is wrong, with a command that shows it, and how often; requests by phase and operation.
    """
    config = schemathesis.Config.from_dict(
        {
            "seed": seed,
            **({} if seconds is None else {"max-time": seconds}),
            "headers": {"Authorization": f"Bearer {service.root}"},
            "continue-on-failure": True,
            "generation": {"max-examples": examples, "database": "none", "no-shrink": True, "deterministic": True},
            "checks": {"enabled": False, **{name: {"enabled": True} for name in CHECKS}},
        }
    )
    schema = schemathesis.openapi.from_asgi("/openapi.json", answering(service.app), config=config)
    found: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    with mock.patch.object(streams, "ENDED", STATES):  # what is followed ends where it is
        for event in from_schema(schema).execute():
            if isinstance(event, events.ScenarioFinished):
                for case_id, node in event.recorder.cases.items():
                    label = node.value.operation.label
                    asked[f"{event.phase.name.lower()} {label}"] += 1
                    found.update(f"{label}: {text}" for text in _wrong(event.recorder.checks.get(case_id, ())))
            elif isinstance(event, events.NonFatalError | events.FatalError):
                found[str(event)] += 1
    return found, asked


def _wrong(checks: Iterable[Any]) -> Iterator[str]:
    for check in checks:
        if (info := check.failure_info) is not None:
            yield f"{info.failure.title}: {info.failure.message}\n{info.code_sample}"


def main() -> None:
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--minutes", type=float, default=5)
    arguments.add_argument("--seed", type=int, default=int(time.time()))
    arguments.add_argument("--examples", type=int, default=50)
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as home:
        service = Contracted(Path(home))
        found, asked = failures(service, examples=given.examples, seed=given.seed, seconds=round(given.minutes * 60))
        service.close()
    for text, times in sorted(found.items()):
        print(f"--- {times} times: {text}")
    print(f"seed {given.seed}: {asked.total()} requests, {len(found)} failures")
    for what, times in sorted(asked.items()):
        print(times, what)


if __name__ == "__main__":
    main()
