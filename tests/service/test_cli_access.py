"""`manta token`, `manta project`, `manta audit`: on the database of this machine, and by REST as somebody."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from cluster import embedded
from cluster.embedded import ClusterError, Head
from service import cli, client, local_cluster
from tests.service.fakes import local_client
from tests.service.secured import Secured

runner = CliRunner()
cli._more_commands()


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("MANTA_URL", "MANTA_TOKEN", "MANTA_PROJECT", "MANTA_DATABASE_URL", "MANTA_HOST"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MANTA_HOME", str(tmp_path))
    return tmp_path


@pytest.fixture
def service(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Secured]:
    """Behind MANTA_URL."""
    service = Secured(home)
    monkeypatch.setattr(client.httpx, "Client", lambda headers, **_: local_client(service.app, **headers))
    monkeypatch.setenv("MANTA_URL", "http://manta")
    yield service
    service.close()


def manta(*arguments: str, code: int = 0) -> Result:
    result = runner.invoke(cli.app, [*arguments])
    assert result.exit_code == code, (result.output, result.exception)
    return result


def test_the_first_token_is_printed_once_and_opens_the_service(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = manta("token", "create", "ann", "--role", "admin", code=1)
    assert "expected an admin of all projects" in refused.stderr
    made = manta("token", "create", "ann", "--role", "admin", "--all-projects")
    token = made.stdout.strip()
    assert token.startswith("manta_") and "not shown again" in made.stderr and token not in made.stderr
    assert token not in manta("token", "list", "--json").stdout + manta("audit", "--json").stdout
    service = Secured(home, host="0.0.0.0")
    service.now = 1e9  # of the token's life
    assert service.client(token).get("/v1/tokens").json()["tokens"][0]["name"] == "ann"
    assert service.client().get("/v1/tokens").status_code == 401
    service.close()


def test_on_this_machine(home: Path) -> None:
    manta("token", "create", "ann", "--role", "admin", "--all-projects", "--expires", "never")
    assert manta("project", "create", "vision").stdout == "vision\n"
    assert "there already" in manta("project", "create", "vision", code=1).stderr
    assert [p["name"] for p in json.loads(manta("project", "list", "--json").stdout)] == ["default", "vision"]
    made = json.loads(manta("token", "create", "bot", "--role", "submitter", "--project", "vision", "--json").stdout)
    assert (made["role"], made["project"], made["token"][:6]) == ("submitter", "vision", "manta_")
    assert manta("token", "revoke", made["id"]).stdout == f"{made['id']} is revoked\n"
    assert "does not exist" in manta("token", "revoke", "tok-none", code=1).stderr
    assert "Input should be 'viewer'" in manta("token", "create", "x", "--role", "root", code=1).stderr
    assert "expected seconds" in manta("token", "create", "x", "--role", "viewer", "--expires", "soon", code=1).stderr
    listed = [line.split("\t") for line in manta("token", "list").stdout.splitlines()]
    assert [row[1:4] for row in listed[1:]] == [["bot", "submitter", "vision"], ["ann", "admin", "*"]]
    assert listed[1][6] and not listed[2][6] and not listed[2][5]  # revoked, not revoked, never expires
    told = json.loads(manta("audit", "--json").stdout)
    assert {entry["who"][:6] for entry in told} == {"local:"}
    assert [(entry["action"].split("/")[2], entry["status"]) for entry in told[::-1]] == [
        ("tokens", 200),
        ("projects", 200),
        ("projects", 409),
        ("tokens", 200),
        ("tokens", 200),
        ("tokens", 404),
    ]


def test_by_rest_as_the_token_says(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    service.project("vision")
    root = service.token("root", "admin")
    assert "got no token" in manta("jobs", code=1).stderr
    monkeypatch.setenv("MANTA_TOKEN", root)
    made = json.loads(manta("token", "create", "bot", "--role", "submitter", "--project", "vision", "--json").stdout)
    assert [entry["who"] for entry in json.loads(manta("audit", "--json").stdout)] == ["root"]
    mine, theirs = service.job("bot", "vision"), service.job("ann", "default")
    monkeypatch.setenv("MANTA_TOKEN", made["token"])
    assert [job["id"] for job in json.loads(manta("jobs", "--json").stdout)] == [mine]
    assert manta("pause", mine).stdout == f"{mine} PAUSED\n"
    assert "does not exist" in manta("pause", theirs, code=1).stderr
    assert "expected admin" in manta("token", "list", code=1).stderr
    monkeypatch.setenv("MANTA_TOKEN", root)
    monkeypatch.setenv("MANTA_PROJECT", "default")
    assert [job["id"] for job in json.loads(manta("jobs", "--json").stdout)] == [theirs]
    manta("token", "revoke", made["id"])
    monkeypatch.setenv("MANTA_TOKEN", made["token"])
    assert "is revoked" in manta("jobs", code=1).stderr


def test_nothing_is_started_beyond_loopback_without_a_token(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    def start(home: Path, **options: object) -> Head:
        started.append(options)
        raise ClusterError("enough")

    monkeypatch.setattr(embedded, "start", start)
    refused = manta("up", "--host", "0.0.0.0", code=4)
    assert "no token, expected one" in refused.stderr and "--all-projects" in refused.stderr and started == []
    monkeypatch.setenv("MANTA_HOST", "10.0.0.7")
    with pytest.raises(ClusterError, match=r"host 10\.0\.0\.7 and no token"):
        local_cluster.up(home)
    manta("token", "create", "ann", "--role", "admin", "--all-projects")
    assert "enough" in manta("up", "--host", "0.0.0.0", code=4).stderr
    assert [options["http_host"] for options in started] == ["0.0.0.0"]


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:80"),
        ("0.0.0.0", "http://127.0.0.1:80"),
        ("10.0.0.7", "http://10.0.0.7:80"),
    ],
)
def test_how_this_machine_reaches_the_front_end(host: str, url: str) -> None:
    paths = dict.fromkeys(("home", "temp_dir", "token_path"), Path("/x"))
    head = Head(
        pid=1,
        created=0,
        address="",
        dashboard_url="",
        http_host=host,
        http_port=80,
        metric_ports=(1, 2),
        num_cpus=2,
        **paths,
    )
    assert head.url == url


@pytest.mark.parametrize("by_rest", [False, True])
def test_quotas_by_either_way(by_rest: bool, request: pytest.FixtureRequest) -> None:
    if by_rest:
        request.getfixturevalue("service")
    manta("project", "create", "vision", "--max-gpus", "8", "--max-running", "2")
    shown = manta("project", "set", "vision", "--max-running", "none", "--share", "2").stdout.splitlines()
    assert shown[1].split("\t") == ["vision", "0 of 8", "0 of any", "0 of any", "2"]
    assert manta("project", "list").stdout.splitlines()[2] == shown[1]
    assert (
        "should be greater than or equal to 0" in manta("project", "set", "vision", "--max-gpus", "-1", code=1).stderr
    )
    assert "does not exist" in manta("project", "set", "none", "--share", "1", code=1).stderr
    assert "expected at least one" in manta("project", "set", "vision", code=2).stderr
