"""Who may what: every route with every role, in its project and beside it; requests without and with wrong tokens."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import APIRouter
from fastapi.staticfiles import StaticFiles
from fastapi.testclient import TestClient

from service.access import PUBLIC, RULES, without_rule
from service.app import build
from service.principal import ALL, LOCAL, ROLES
from service.tokens import NoToken
from tests.service.secured import BODY, DAY_S, Secured


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path)
    yield service
    service.close()


def expect(answer: httpx.Response, status: int, words: str = "") -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert {"type", "title", "status", "detail", "hint", "retryable"} <= problem.keys()
    assert problem["status"] == status and words in problem["detail"] and problem["hint"], problem


def ask(client: TestClient, key: str, project: str, job_id: str, token_id: str, webhook_id: str) -> httpx.Response:
    """A request of the route with something of `project` in its path."""
    method, path = key.split(" ")
    kind = path.split("/")[2] if path.startswith("/v1/") else ""
    name = {"methods": "mae", "evaluations": "knn", "searches": "zen_nas"}.get(kind, f"of-{project}")
    bodies: dict[str, Any] = {
        "POST /v1/jobs": BODY,
        "POST /v1/jobs:batch": [BODY, BODY | {"name": "next", "after": ["$toy"]}],
        "POST /v1/tokens": {"name": "y", "role": "viewer", "project": project},
        "POST /v1/projects": {"name": "three"},
        "POST /v1/webhooks": {"url": "https://93.184.216.34/x"},
        "POST /v1/jobs/{job_id}:clone": {"name": "more"},
    }
    parameters = {"project": project} if key in ("POST /v1/jobs", "POST /v1/jobs:batch", "POST /v1/webhooks") else {}
    return client.request(
        method,
        path.format(job_id=job_id, other_id=job_id, token_id=token_id, webhook_id=webhook_id, name=name),
        json=bodies.get(key),
        params=parameters,
    )


def test_every_route_with_every_role_and_project(service: Secured) -> None:
    """The table itself is what is expected: 401 without a token, 404 for what is another's, 403 below the role."""
    for project in ("one", "two"):
        service.project(project)
        service.model(f"of-{project}", project)
    service.token("root", "admin")
    job_id = service.job(project="one")
    token_id = service.parts.tokens.create(LOCAL, "x", "viewer", "one", DAY_S)[0].id
    routes = {key: rule for key, rule in RULES.items() if not key.endswith(("/docs", "/openapi.json"))}
    asked = 0
    for role, project in [(None, ALL), *product(ROLES, (ALL, "one", "two"))]:
        token = None if role is None else service.token(f"{role}-{project}", role, project)
        client = service.client(token)
        for key, rule in routes.items():
            webhook_id = service.webhook("one") if "{webhook_id}" in key else ""
            answer = ask(client, key, "one", job_id, token_id, webhook_id)
            owned = "_id}" in key or "/v1/models/{name}" in key
            named = owned or key in ("POST /v1/jobs", "POST /v1/jobs:batch", "POST /v1/tokens", "POST /v1/webhooks")
            if rule.least is None:
                expected = {200, 503}
            elif role is None:
                expected = {401}
            elif project == "two" and owned:
                expected = {404}
            elif ROLES.index(role) < ROLES.index(rule.least):
                expected = {403}
            elif project == "two" and named:
                expected = {404}
            elif rule.whole and project != ALL:
                expected = {403}
            elif (rule.own and role == "submitter") or (key == "POST /v1/projects" and project != ALL):
                expected = {403}  # it is the job of ann; a project is made by an admin of all
            else:
                expected = {200, 201, 202, 204, 409, 422}
            assert answer.status_code in expected, (key, role, project, answer.text)
            asked += 1
    assert asked == 13 * len(routes)


def test_a_route_without_a_rule_is_not_built(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_rule(service.app.routes) == []
    router = APIRouter()
    router.add_api_route("/v1/backdoor", lambda: {}, methods=["GET", "POST"])
    service.app.include_router(router)
    service.app.mount("/files", StaticFiles(directory=service.settings.home))
    assert sorted(without_rule(service.app.routes)) == ["/files", "GET /v1/backdoor", "POST /v1/backdoor"]
    monkeypatch.delitem(RULES, "POST /v1/jobs")
    with pytest.raises(RuntimeError, match="POST /v1/jobs"):
        build(service.settings, service.parts)


def test_what_another_project_has_is_as_if_it_were_not_there(service: Secured) -> None:
    service.project("one")
    service.token("root", "admin")
    client = service.client(service.token("bob", "operator"))
    theirs = service.client(service.token("eve", "admin", "one"))
    job_id = service.job()
    assert theirs.get(f"/v1/jobs/{service.job(project='one')}/diff/{job_id}").json()["detail"].count("does not exist")
    for verb in ("", "/logs", "/report", "/events"):
        got = [theirs.get(f"/v1/jobs/{name}{verb}").json() for name in (job_id, "job-none")]
        assert got[0]["detail"].replace(job_id, "job-none") == got[1]["detail"] and got[0]["status"] == 404
    service.model("secret-model")
    service.model("own", "one")
    for name in ("secret-model", "no-model"):
        hidden = theirs.get(f"/v1/models/{name}").json()
        assert hidden["status"] == 404 and hidden["hint"] == "registered are own"
    assert [m["name"] for m in theirs.get("/v1/models").json()["models"]] == ["own"]
    assert [m["name"] for m in client.get("/v1/models").json()["models"]] == ["own", "secret-model"]
    assert [job["project"] for job in theirs.get("/v1/jobs").json()["jobs"]] == ["one"]
    expect(theirs.get("/v1/jobs?project=default"), 404, "project 'default', which does not exist")
    expect(theirs.post("/v1/jobs?project=default", json=BODY), 404)
    assert client.get("/v1/jobs?project=default").json()["jobs"][0]["id"] == job_id
    assert [p["name"] for p in theirs.get("/v1/projects").json()["projects"]] == ["one"]
    assert {t["name"] for t in theirs.get("/v1/tokens").json()["tokens"]} == {"eve"}


def test_a_submitter_stops_its_own_jobs_also_with_a_new_token(service: Secured) -> None:
    service.token("root", "admin")
    first = service.client(service.token("ann", "submitter"))
    job_id = first.post("/v1/jobs", json=BODY).json()["id"]
    assert first.get(f"/v1/jobs/{job_id}").json()["owner"] == "ann"
    expect(service.client(service.token("bob", "submitter")).post(f"/v1/jobs/{job_id}:pause"), 403, "expected ann")
    again = service.client(service.token("ann", "submitter"))
    assert again.post(f"/v1/jobs/{job_id}:pause").status_code == 202
    assert service.client(service.token("carl", "operator")).post(f"/v1/jobs/{job_id}:cancel").status_code == 202


@pytest.mark.parametrize(
    ("header", "challenge"),
    [
        (None, 'Bearer realm="manta"'),
        ("Bearer manta_wrong", 'error="invalid_token"'),
        ("Bearer ", 'error="invalid_token"'),
        ("Bearer\u00a0x", 'error="invalid_token"'),
        ("Basic cm9vdDpyb290", 'error="invalid_token"'),
    ],
)
def test_no_token_and_wrong_ones(service: Secured, header: str | None, challenge: str) -> None:
    service.token("root", "admin")
    headers = {} if header is None else {"Authorization": header.encode("latin-1")}
    for path in ("/v1/jobs", "/v1/jobs/none", "/nowhere"):
        answer = service.client().get(path, headers=headers)
        expect(answer, 401)
        assert challenge in answer.headers["www-authenticate"]
    assert service.client().get("/healthz", headers=headers).status_code == 200
    assert service.client().get("/docs/static/swagger-ui.css").status_code == 200


def test_a_scheme_is_written_in_any_case(service: Secured) -> None:
    token = service.token("root", "admin")
    assert service.client().get("/v1/jobs", headers={"Authorization": f"bearer {token}"}).status_code == 200


def test_a_token_in_the_path_is_none(service: Secured) -> None:
    token = service.token("root", "admin")
    expect(service.client().get(f"/v1/jobs?token={token}&access_token={token}"), 401)


def test_a_project_admin_makes_tokens_of_its_project_only(service: Secured) -> None:
    service.project("one")
    service.token("root", "admin")
    client = service.client(service.token("eve", "admin", "one"))
    made = client.post("/v1/tokens", json={"name": "new", "role": "admin", "project": "one"})
    assert made.status_code == 201 and made.headers["location"] == f"/v1/tokens/{made.json()['id']}"
    for project in (ALL, "default", "none"):
        expect(client.post("/v1/tokens", json={"name": "new", "role": "viewer", "project": project}), 404)
    for wrong in ({"name": "a b"}, {"role": "root"}, {"lifetime": 0}, {"lifetime": "soon"}, {"hash": "x"}):
        body = {"name": "new", "role": "viewer", "project": "one"} | wrong
        expect(client.post("/v1/tokens", json=body), 422)


@pytest.mark.parametrize(
    ("client", "host", "origin", "status"),
    [
        ("127.0.0.1", "localhost:8000", None, 201),
        ("::1", "[::1]:8000", "http://[::1]:8000", 201),
        ("127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:8000", 201),
        ("127.0.0.1", "127.0.0.1:8000", "https://evil.example", 403),
        ("127.0.0.1", "127.0.0.1:8000", "http://127.0.0.1:9000", 403),
        ("127.0.0.1", "127.0.0.1:8000", "null", 403),
        ("127.0.0.1", "evil.example", None, 403),
        ("127.0.0.1", "[", "http://[", 403),
        ("127.0.0.1", "", None, 403),
        ("127.0.0.1", "127.0.0.1.evil.example", None, 403),
        ("10.0.0.7", "127.0.0.1", None, 403),
        ("127.0.0.1.evil.example", "127.0.0.1", None, 403),
        ("", "127.0.0.1", None, 403),
    ],
)
def test_a_service_without_tokens_is_for_its_own_machine(
    service: Secured, client: str, host: str, origin: str | None, status: int
) -> None:
    """Also where somebody made it listen elsewhere, or a page in a browser of this machine asks (DNS rebinding)."""
    asking = TestClient(service.app, client=(client, 1), raise_server_exceptions=False)
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    answer = asking.post("/v1/jobs", json=BODY, headers=headers)
    assert answer.status_code == status, answer.text
    if status == 201:
        assert (answer.json()["owner"], answer.json()["project"]) == ("local", "default")
    else:
        expect(answer, 403)
    assert asking.get("/healthz", headers=headers).status_code == 200


@pytest.mark.parametrize("header", ["Forwarded", "X-Forwarded-For", "X-Forwarded-Proto", "X-Real-IP", "Via"])
def test_a_proxy_of_this_machine_brings_nobody_in(service: Secured, header: str) -> None:
    """NGINX sends its own address and Host by default: all who ask it would be admins."""
    passed_on = {header: "x"}
    problem = service.client().get("/v1/jobs", headers=passed_on)
    expect(problem, 403)
    assert "proxy" in problem.json()["detail"] and "manta token create" in problem.json()["hint"]
    assert service.client().get("/healthz", headers=passed_on).status_code == 200
    ann = service.client(service.token("ann", "admin"))
    assert ann.get("/v1/jobs", headers=passed_on).status_code == 200


def test_it_does_not_listen_beyond_loopback_without_a_token(tmp_path: Path) -> None:
    for host in ("0.0.0.0", "10.0.0.7", "manta.example"):
        with pytest.raises(NoToken, match="no token, expected one before other machines"):
            Secured(tmp_path, host=host)
    for host in ("127.0.0.1", "localhost", "::1"):
        Secured(tmp_path, host=host).close()
    file = tmp_path / "secret"
    file.write_text("short\n")
    with pytest.raises(ValueError, match="got 5 characters"):
        Secured(tmp_path, host="0.0.0.0", first_admin_token_file=file)
    file.write_text("0123456789abcdef" * 3 + "\n")
    service = Secured(tmp_path, host="0.0.0.0", first_admin_token_file=file)
    assert service.client("0123456789abcdef" * 3).get("/v1/audit").status_code == 200
    expect(service.client().get("/v1/jobs"), 401)
    file.write_text("another-one-" * 4)  # an admin is there: the file makes no second one
    again = Secured(tmp_path, host="0.0.0.0", first_admin_token_file=file)
    expect(again.client("another-one-" * 4).get("/v1/jobs"), 401)
    for one in (service, again):
        one.close()


def test_tokens_that_are_required_are_asked_for_before_there_is_one(tmp_path: Path) -> None:
    service = Secured(tmp_path, tokens="required")
    expect(service.client().get("/v1/jobs"), 401)
    service.close()


def test_a_probe_tells_strangers_no_addresses(tmp_path: Path) -> None:
    service = Secured(tmp_path, host="0.0.0.0", tokens="required")
    answer = service.client().get("/readyz")
    assert answer.status_code == 503
    assert set(answer.json()["missing"].values()) == {"the log of the service says more"}
    service.close()


def test_a_path_that_no_database_takes(service: Secured) -> None:
    expect(service.client().get("/v1/jobs/%00"), 400)
    expect(service.client().post("/v1/jobs/%00:cancel"), 400)


def test_the_contract_names_the_way_to_ask(service: Secured) -> None:
    contract = service.client().get("/openapi.json").json()
    assert contract["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert contract["paths"]["/v1/jobs"]["post"]["security"] == [{"HTTPBearer": []}]


def test_the_first_token_closes_a_service_that_runs_and_revoking_all_does_not_open_it(service: Secured) -> None:
    client = service.client()
    assert client.get("/v1/jobs").status_code == 200
    expect(client.post("/v1/tokens", json={"name": "a", "role": "viewer"}), 409, "first token as viewer of default")
    body = {"name": "a", "role": "admin", "project": "*", "lifetime": None}
    made = client.post("/v1/tokens", json=body).json()
    expect(client.get("/v1/jobs"), 401)
    admin = service.client(made["token"])
    assert admin.delete(f"/v1/tokens/{made['id']}").json()["revoked_at"] is not None
    expect(admin.get("/v1/jobs"), 401, "revoked")
    expect(client.get("/v1/jobs"), 401)


def test_the_table_lets_nobody_change_anything_unseen() -> None:
    changes = {key for key, rule in RULES.items() if rule.changes}
    asks = {f"POST /v1/models/{{name}}:{verb}" for verb in ("predict", "embed", "reconstruct")}
    assert changes == {key for key in RULES if not key.startswith("GET ")} - asks
    assert all(RULES[key].least in ("submitter", "operator", "admin") for key in changes)
    assert {"/healthz", "/readyz", "/docs", "/openapi.json"} == PUBLIC
    people = ("/v1/tokens", "/v1/audit", "POST /v1/projects")
    assert all(rule.least == "admin" for key, rule in RULES.items() if any(part in key for part in people))
