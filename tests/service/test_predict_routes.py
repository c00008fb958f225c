import asyncio
import base64
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi.testclient import TestClient
from httpx import Response
from ray.exceptions import ActorDiedError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from service import predictor
from service.app import build
from service.audit import Audit
from service.errors import BadImage, NotDeployed, NotFound, Unavailable
from service.observe.requests import RequestMetrics
from service.registry import Registry
from service.settings import Settings
from service.store import Deployment, Store
from service.tokens import Tokens
from tests.service.fakes import local_client

PATH = "/v1/models/digits"


class FakeHandle:
    """Answers with the lengths of the images, or raises."""

    def __init__(self) -> None:
        self.fails: Exception | None = None
        self.hangs = False
        self.asked: list[tuple[str, list[bytes]]] = []

    def options(self, method_name: str) -> Any:
        async def remote(images: list[bytes]) -> dict[str, Any]:
            self.asked.append((method_name, images))
            if self.fails is not None:
                raise self.fails
            if self.hangs:
                await asyncio.Event().wait()
            return {"model": "digits@3", "outputs": [len(image) for image in images]}

        return SimpleNamespace(remote=remote)


class FakeDeployments:
    def __init__(self) -> None:
        self.served: FakeHandle | Exception = FakeHandle()
        self.calls: list[tuple[Any, ...]] = []

    async def handle(self, name: str) -> FakeHandle:
        if isinstance(self.served, Exception):
            raise self.served
        return self.served

    def deploy(self, name: str, version: int | None) -> Deployment:
        self.calls.append(("deploy", name, version))
        if name != "digits":
            raise NotFound(f"got model {name!r}", "registered are digits")
        return Deployment(name=name, version=version or 3, state="DEPLOYING")

    def wait(self, name: str, timeout_s: float) -> Deployment:
        return Deployment(name=name, version=3, state="RUNNING")

    def undeploy(self, name: str) -> None:
        self.calls.append(("undeploy", name))


@pytest.fixture
def fake() -> FakeDeployments:
    return FakeDeployments()


@pytest.fixture
def client(fake: FakeDeployments, tmp_path: Path) -> Iterator[TestClient]:
    settings = Settings(home=tmp_path, max_images=4, max_body_bytes=4096)
    store = Store(settings.database)
    parts: Any = SimpleNamespace(
        settings=settings,
        deployments=fake,
        registry=Registry(settings, store),
        tokens=Tokens(store),
        audit=Audit(store),
        exposition=SimpleNamespace(requests=RequestMetrics()),
        start=lambda: None,
        stop=store.close,
    )
    with local_client(build(settings, parts)) as client:
        yield client


def in_base64(*images: bytes) -> dict[str, list[str]]:
    return {"images": [base64.b64encode(image).decode() for image in images]}


def expect(answer: Response, status: int, *, detail: str, hint: str) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert detail in problem["detail"] and hint in problem["hint"], problem
    assert problem["retryable"] == (status == 503) == ("retry-after" in answer.headers)


@pytest.mark.parametrize("verb", ["predict", "embed", "reconstruct"])
def test_images_arrive_in_order_and_the_answer_says_who_answered(
    client: TestClient, fake: FakeDeployments, verb: str
) -> None:
    answer = client.post(f"{PATH}:{verb}", json=in_base64(b"a", b"bbb", b"cc"))
    assert answer.status_code == 200, answer.text
    assert answer.json() == {"model": "digits@3", "outputs": [1, 3, 2]}
    assert fake.served.asked == [(verb, [b"a", b"bbb", b"cc"])]


def test_files_of_a_form_are_images_as_well(client: TestClient, fake: FakeDeployments) -> None:
    assert client.post(f"{PATH}:predict", files={"file": b"abc"}).json()["outputs"] == [3]
    several = [("file", b"abc"), ("file", b"a")]
    assert client.post(f"{PATH}:predict", files=several).json()["outputs"] == [3, 1]
    five = [("file", b"a")] * 5
    assert client.post(f"{PATH}:predict", files=five).status_code == 400
    expect(client.post(f"{PATH}:predict", data={"a": "b"}, files={}), 400, detail="body", hint='{"images"')


@pytest.mark.parametrize(
    ("body", "status", "detail", "hint"),
    [
        ({"images": []}, 400, "got no image", '{"images"'),
        ({}, 400, "images: Field required", '{"images"'),
        ({"images": ["YQ=="], "topk": 3}, 400, "topk", '{"images"'),
        ({"images": [1]}, 400, "images.0", '{"images"'),
        ([], 400, "body", '{"images"'),
        ({"images": ["YQ==", "no base64!"]}, 400, "image 1: got no base64", "base64"),
        ({"images": ["\u00e4"]}, 400, "image 0: got no base64", "base64"),
        ({"images": ["YQ=="] * 5}, 413, "got 5 images, expected at most 4", "several requests"),
        ({"images": ["A" * 8000]}, 413, "bytes, expected at most 4096", "less"),
    ],
)
def test_requests_that_mean_nothing(
    client: TestClient, fake: FakeDeployments, body: Any, status: int, detail: str, hint: str
) -> None:
    expect(client.post(f"{PATH}:predict", json=body), status, detail=detail, hint=hint)
    assert fake.served.asked == []


def test_a_body_that_is_no_json_or_of_unknown_length(client: TestClient) -> None:
    expect(client.post(f"{PATH}:predict", content=b"{"), 400, detail="Invalid JSON", hint='{"images"')
    expect(client.post(f"{PATH}:predict", content=iter([b"{", b"}"])), 400, detail="Field required", hint='{"images"')
    unending = client.post(f"{PATH}:predict", content=iter([b" " * 4000, b" " * 4000]))
    expect(unending, 413, detail="more than 4096 bytes", hint="less")


@pytest.mark.parametrize(
    ("error", "status"),
    [(NotFound("a", "b"), 404), (NotDeployed("a", "b"), 409), (Unavailable("a", "b"), 503)],
)
def test_a_model_that_does_not_run_is_said_before_the_body_is_read(
    client: TestClient, fake: FakeDeployments, error: Exception, status: int
) -> None:
    fake.served = error
    expect(client.post(f"{PATH}:predict", json={}), status, detail="a", hint="b")


@pytest.mark.parametrize(
    ("error", "status", "detail"),
    [
        (RayTaskError("predict", "traceback with pid=7", BadImage("image 1: no", "send one")), 422, "image 1: no"),
        (BackPressureError(128, 128), 503, "more requests than wait"),
        (DeploymentUnavailableError("d"), 503, "replica"),
        (ActorDiedError(), 503, "replica"),
    ],
)
def test_what_the_predictor_or_ray_says(
    client: TestClient, fake: FakeDeployments, error: Exception, status: int, detail: str
) -> None:
    fake.served.fails = error
    expect(client.post(f"{PATH}:predict", json=in_base64(b"a")), status, detail=detail, hint="")


def test_a_bug_in_the_replica_tells_nothing_of_the_machine(client: TestClient, fake: FakeDeployments) -> None:
    fake.served.fails = RayTaskError("predict", "pid=7, ip=10.0.0.1", RuntimeError("out of memory"))
    answer = client.post(f"{PATH}:predict", json=in_base64(b"a"))
    expect(answer, 500, detail="request", hint="log")
    assert "pid" not in answer.text and "10.0.0.1" not in answer.text


def test_an_answer_that_never_comes(client: TestClient, fake: FakeDeployments, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(predictor, "TIMEOUT_S", 0.0)
    fake.served.hangs = True
    expect(client.post(f"{PATH}:predict", json=in_base64(b"a")), 503, detail="no answer", hint="fewer images")


def test_deploy_and_undeploy(client: TestClient, fake: FakeDeployments) -> None:
    answer = client.post(f"{PATH}/deploy")
    assert answer.status_code == 202
    assert answer.json() == {"model": "digits@3", "state": "DEPLOYING", "reason": None}
    assert client.post(f"{PATH}/deploy", json={"version": 2}).json()["model"] == "digits@2"
    assert client.post(f"{PATH}/deploy?wait=true", json={}).json()["state"] == "RUNNING"
    assert client.delete(f"{PATH}/deploy").status_code == 204
    versions = [("deploy", "digits", None), ("deploy", "digits", 2), ("deploy", "digits", None)]
    assert fake.calls == [*versions, ("undeploy", "digits")]
    assert client.post(f"{PATH}/deploy", json={"versoin": 2}).status_code == 422
    assert client.post(f"{PATH}/deploy", json={"version": 0}).status_code == 422
    expect(client.post("/v1/models/digit/deploy"), 404, detail="digit", hint="registered are digits")


def test_both_forms_are_documented(client: TestClient) -> None:
    path = client.get("/openapi.json").json()["paths"]["/v1/models/{name}:predict"]["post"]
    assert set(path["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
    assert [parameter["name"] for parameter in path["parameters"]] == ["name"]
