"""The Python SDK: the REST calls of the service, one method each.

    client = Client("http://127.0.0.1:8000")
    job = client.submit(spec)
    client.wait(job["id"])
    client.deploy("digits", wait_s=60)
    client.predict("digits", [Path("seven.png").read_bytes()])

Answers are the JSON of the service as dictionaries; errors are ApiError. Submissions, `wait` and what follows a job
outlive a restart of the service (`service.retries`); any other call is made once.
"""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any

import httpx

from service.api_error import ApiError as ApiError
from service.api_error import expect_answer, no_answer
from service.followed import follow
from service.retries import Retries

Answer = dict[str, Any]
TERMINAL = ("SUCCEEDED", "FAILED", "CANCELLED")


class Client:
    """A connection to one service; a context manager."""

    def __init__(
        self,
        url: str,
        *,
        token: str | None = None,
        project: str | None = None,
        timeout_s: float = 60.0,
        transport: httpx.BaseTransport | None = None,
        retries: Callable[[], Retries] = Retries,
    ) -> None:
        """Connects lazily.

        Args:
            url: of the front end.
            token: of who asks, where the service has tokens.
            project: that jobs are submitted to and listed of; default: the token's.
            timeout_s: of one answer.
            transport: for tests, `httpx.MockTransport`.
            retries: the policy by which it asks again.
        """
        self.url, self._retries = url, retries
        self._project = {} if project is None else {"project": project}
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        # trust_env: a proxy of the environment is not for a service on this machine
        self._http = httpx.Client(
            base_url=url, headers=headers, timeout=timeout_s, transport=transport, trust_env=False
        )

    def __enter__(self) -> Client:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    def _send(self, method: str, path: str, **options: Any) -> httpx.Response:
        try:
            response = self._http.request(method, path, **options)
        except httpx.TransportError as error:
            raise no_answer(self.url, error) from error
        expect_answer(response)
        return response

    def _call(self, method: str, path: str, **options: Any) -> Answer:
        answer: Answer = self._send(method, path, **options).json()
        return answer

    def submit(self, spec: Answer, *, idempotency_key: str | None = None) -> Answer:
        """Submits a JobSpec; a lost answer is asked for again under the same key, which makes one job."""
        return self._make("/v1/jobs", spec, idempotency_key, **self._project)

    def _make(self, path: str, body: Any, idempotency_key: str | None, **parameters: str) -> Answer:
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        retries = self._retries()
        while True:
            try:
                return self._call("POST", path, json=body, headers=headers, params=parameters)
            except ApiError as error:
                retries.wait(error)

    def submit_all(self, specs: Sequence[Answer], *, idempotency_key: str | None = None) -> list[Answer]:
        """Submits a list, all or none; `after: [$name]` and `job:$name` mean an earlier job of it by its `name`."""
        made: list[Answer] = self._make("/v1/jobs:batch", list(specs), idempotency_key, **self._project)["jobs"]
        return made

    def dry_run(self, spec: Answer, *, gpu: str | None = None) -> Answer:
        """What the job would do and cost, and how long by earlier runs (else by the peak of `gpu`); stores nothing."""
        wanted = {"dry_run": True, **self._project, **({} if gpu is None else {"gpu": gpu})}
        return self._call("POST", "/v1/jobs", json=spec, params=wanted)

    def job(self, job_id: str) -> Answer:
        return self._call("GET", f"/v1/jobs/{job_id}")

    def jobs(self, *, limit: int = 50, state: str | None = None) -> list[Answer]:
        """The newest jobs, over as many pages as `limit` needs."""
        found: list[Answer] = []
        cursor: int | None = None
        while len(found) < limit:
            wanted = {"limit": min(500, limit - len(found)), "cursor": cursor, "state": state, **self._project}
            page = self._call("GET", "/v1/jobs", params={k: v for k, v in wanted.items() if v is not None})
            found += page["jobs"]
            cursor = page["next"]
            if cursor is None:
                break
        return found

    def cancel(self, job_id: str) -> Answer:
        return self._call("POST", f"/v1/jobs/{job_id}:cancel")

    def pause(self, job_id: str) -> Answer:
        """Returns at once; the job is PAUSED when its checkpoint is written."""
        return self._call("POST", f"/v1/jobs/{job_id}:pause")

    def resume(self, job_id: str, *, max_duration: float | str | None = None) -> Answer:
        """Queues a paused job again; with a longer `max_duration` (seconds, "2h") also one that reached its own."""
        return self._call("POST", f"/v1/jobs/{job_id}:resume", json={"max_duration": max_duration})

    def retry(self, job_id: str) -> Answer:
        """Queues a failed or cancelled job again; it goes on from its checkpoint."""
        return self._call("POST", f"/v1/jobs/{job_id}:retry")

    def clone(self, job_id: str, patch: Answer | None = None, *, idempotency_key: str | None = None) -> Answer:
        """Submits the job once more, changed by a JSON merge patch of its spec."""
        return self._make(f"/v1/jobs/{job_id}:clone", patch or {}, idempotency_key)

    def diff(self, job_id: str, other_id: str) -> Answer:
        """`spec` and `provenance`: `path`, `a`, `b` of each place where the two jobs differ."""
        return self._call("GET", f"/v1/jobs/{job_id}/diff/{other_id}")

    def events(self, job_id: str, *, after: str = "0-0") -> list[Answer]:
        """What happened to the job; `after`: the `cursor` of an earlier event."""
        found: list[Answer] = self._call("GET", f"/v1/jobs/{job_id}/events", params={"after": after})["events"]
        return found

    def metrics(self, job_id: str, *, after_step: int = -1, max_points: int | None = None) -> list[Answer]:
        """The curve; with `max_points` the points that show its ends, lows and highs."""
        wanted = {"after_step": after_step} | ({} if max_points is None else {"max_points": max_points})
        points: list[Answer] = self._call("GET", f"/v1/jobs/{job_id}/metrics", params=wanted)["points"]
        return points

    def evaluations(self, job_id: str) -> Answer:
        """`evaluations` of the finished model; `online`, those of checkpoints: `step`, `entry`, `label`, `mean`, ..."""
        return self._call("GET", f"/v1/jobs/{job_id}/evaluations")

    def report(self, job_id: str) -> str:
        """A page for people, as HTML."""
        return self._send("GET", f"/v1/jobs/{job_id}/report").text

    def logs(self, job_id: str, **wanted: Any) -> str:
        """The end of the log; `offset` and `limit` (bytes) choose another part, `level` and `rank` its lines."""
        return self._send("GET", f"/v1/jobs/{job_id}/logs", params=wanted).text

    def follow_logs(self, job_id: str, **wanted: Any) -> Iterator[str]:
        """Lines as they come, until the job ends or is paused; `wanted`: `level`, `rank`, `offset`."""
        return follow(self._http, f"/v1/jobs/{job_id}/logs", wanted, self._retries())

    def follow_metrics(self, job_id: str, *, after_step: int = -1) -> Iterator[Answer]:
        """Points of the curve as they come; of a step that a resumed run repeats the later one counts."""
        wanted = {"after_step": after_step}
        return map(json.loads, follow(self._http, f"/v1/jobs/{job_id}/metrics", wanted, self._retries()))

    def follow_events(self, job_id: str, *, after: str = "0-0") -> Iterator[Answer]:
        """What happens to the job, as it does."""
        return map(json.loads, follow(self._http, f"/v1/jobs/{job_id}/events", {"after": after}, self._retries()))

    def wait(self, job_id: str, on_update: Callable[[Answer], None] = lambda _: None, *, poll_s: float = 0.5) -> Answer:
        """Polls until the job is finished; `on_update` gets every answer, and may ask the service itself."""
        retries = self._retries()
        while True:
            try:
                job = self.job(job_id)
                on_update(job)
            except ApiError as error:
                retries.wait(error)
                continue
            retries.succeeded()
            if job["state"] in TERMINAL:
                return job
            time.sleep(poll_s)

    def methods(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/methods")["methods"]
        return found

    def method(self, name: str) -> Answer:
        return self._call("GET", f"/v1/methods/{name}")

    def searches(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/searches")["searches"]
        return found

    def search(self, name: str) -> Answer:
        return self._call("GET", f"/v1/searches/{name}")

    def models(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/models")["models"]
        return found

    def model(self, name: str) -> Answer:
        return self._call("GET", f"/v1/models/{name}")

    def deploy(self, name: str, *, version: int | None = None, wait_s: float = 0.0) -> Answer:
        """Asks for the model to be served; with `wait_s` returns once it answers, or fails.

        Raises:
            ApiError: it is not registered, could not be started, or is not ready after `wait_s`.
        """
        body = {} if version is None else {"version": version}
        answer = self._call("POST", f"/v1/models/{name}/deploy", json=body)
        deadline = time.monotonic() + wait_s
        while wait_s and answer["state"] != "RUNNING":
            if answer["state"] == "FAILED":
                raise ApiError(500, "Deployment failed", f"{name}: {answer['reason']}", "see the log of the service")
            if time.monotonic() > deadline:
                raise ApiError(503, "Not ready", f"{name} is still {answer['state']} after {wait_s:g} s", "wait longer")
            time.sleep(0.25)
            answer = self.model(name)["deployment"]
        return answer

    def undeploy(self, name: str) -> None:
        self._send("DELETE", f"/v1/models/{name}/deploy")

    def webhooks(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/webhooks", params=self._project)["webhooks"]
        return found

    def create_webhook(self, url: str, *, events: Sequence[str] = TERMINAL) -> Answer:
        """A new one, told when a job comes into one of these states; `secret` in the answer is told this once."""
        return self._call("POST", "/v1/webhooks", json={"url": url, "events": [*events]}, params=self._project)

    def delete_webhook(self, webhook_id: str) -> None:
        self._send("DELETE", f"/v1/webhooks/{webhook_id}")

    def test_webhook(self, webhook_id: str) -> Answer:
        """Sends a ping; `deliveries` has what came of it."""
        return self._call("POST", f"/v1/webhooks/{webhook_id}:test")

    def deliveries(self, webhook_id: str, *, limit: int = 50) -> list[Answer]:
        """What was sent, or is to be; the newest first, at most 500."""
        path = f"/v1/webhooks/{webhook_id}/deliveries"
        found: list[Answer] = self._call("GET", path, params={"limit": limit})["deliveries"]
        return found

    def projects(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/projects")["projects"]
        return found

    def create_project(self, name: str, **quotas: Any) -> Answer:
        return self._call("POST", "/v1/projects", json={"name": name, **quotas})

    def change_project(self, name: str, **quotas: Any) -> Answer:
        """Sets quotas (`max_gpus`, `max_running`, `max_unfinished`: None takes one away; `share`)."""
        return self._call("PATCH", f"/v1/projects/{name}", json=quotas)

    def tokens(self) -> list[Answer]:
        found: list[Answer] = self._call("GET", "/v1/tokens")["tokens"]
        return found

    def create_token(self, name: str, role: str, *, project: str, lifetime: float | str | None) -> Answer:
        """A new one, for all projects where `project` is `*`; `token` in the answer is its text, told this once."""
        body = {"name": name, "role": role, "project": project, "lifetime": lifetime}
        return self._call("POST", "/v1/tokens", json=body)

    def revoke_token(self, token_id: str) -> Answer:
        return self._call("DELETE", f"/v1/tokens/{token_id}")

    def audit(self, *, limit: int = 50) -> list[Answer]:
        """The newest entries of the audit log, at most 500."""
        found: list[Answer] = self._call("GET", "/v1/audit", params={"limit": limit})["entries"]
        return found

    def _infer(self, name: str, verb: str, images: Sequence[bytes]) -> list[Any]:
        body = {"images": [base64.b64encode(image).decode() for image in images]}
        outputs: list[Any] = self._call("POST", f"/v1/models/{name}:{verb}", json=body)["outputs"]
        return outputs

    def predict(self, name: str, images: Sequence[bytes]) -> list[Answer]:
        """Encoded images -> `{label, index, probabilities}` of each, in order."""
        return self._infer(name, "predict", images)

    def embed(self, name: str, images: Sequence[bytes]) -> list[list[float]]:
        return self._infer(name, "embed", images)

    def reconstruct(self, name: str, images: Sequence[bytes]) -> list[Answer]:
        """Encoded images -> base64 PNG of what the method draws."""
        return self._infer(name, "reconstruct", images)
