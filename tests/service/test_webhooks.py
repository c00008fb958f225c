"""Webhooks by REST and by command: who may, where they may go, and what is never told again."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from typer.testing import CliRunner, Result

from service import cli, client
from service.errors import BadRequest
from service.webhook_targets import addresses, expect_url, request
from service.webhooks import MOST
from tests.service.fakes import local_client
from tests.service.secured import Secured

PUBLIC = "https://93.184.216.34/hook"
PRIVATE = (
    "127.0.0.1",
    "10.0.0.7",
    "172.16.0.1",
    "192.168.1.1",
    "169.254.169.254",  # metadata of a cloud machine
    "100.64.0.1",
    "0.0.0.0",
    "224.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1%eth0",
    "fd00::1",
    "ff02::1",
    "::ffff:10.0.0.7",
    "64:ff9b::a00:7",
    "2002:a00:7::",
)
runner = CliRunner()
cli._more_commands()


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Secured]:
    service = Secured(tmp_path / "home", webhook_hosts="127.0.0.1 ci.internal")
    yield service
    service.close()


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_refused_whatever_name_they_have(address: str) -> None:
    async def find(host: str, port: int) -> list[str]:
        return ["93.184.216.34", address]

    url = expect_url("https://innocent.example/x")
    with pytest.raises(BadRequest, match="expected one whose addresses are all public"):
        asyncio.run(addresses(url, (), find))
    assert asyncio.run(addresses(url, ("innocent.example",), find))[1] == address


def test_public_addresses_and_their_ports() -> None:
    asked = []

    async def find(host: str, port: int) -> list[str]:
        asked.append((host, port))
        return ["93.184.216.34", "2606:4700::1111", "93.184.216.34", "::ffff:93.184.216.34"]

    for url in ("https://a.example/x", "https://a.example:8443/x"):
        found = asyncio.run(addresses(expect_url(url), (), find))
        assert found == ["93.184.216.34", "2606:4700::1111", "::ffff:93.184.216.34"]
    assert asked == [("a.example", 443), ("a.example", 8443)]
    sent = request(expect_url("https://a.example:8443/x?y=1"), "2606:4700::1111", b"{}", {"webhook-id": "m"})
    assert str(sent.url) == "https://[2606:4700::1111]:8443/x?y=1"
    assert (sent.headers["host"], sent.headers["content-length"]) == ("a.example:8443", "2")


def test_a_name_without_addresses() -> None:
    async def find(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    with pytest.raises(BadRequest, match="which has no address"):
        asyncio.run(addresses(expect_url("https://nowhere.example"), (), find))


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/x",
        "http://ci.internal/x",
        "ftp://example.com/x",
        "file:///etc/passwd",
        "example.com",
        "https://",
        "https://user:canary@example.com/x",
        "https://example.com/x#canary",
        "https://" + "a" * 2000 + ".com",
        "https://exa\nmple.com",
        "https://[::1",
        "https://example.com:99999",
    ],
)
def test_other_urls_are_refused_and_not_repeated(service: Secured, url: str) -> None:
    answer = service.client().post("/v1/webhooks", json={"url": url})
    assert answer.status_code in (400, 422), answer.text
    assert "canary" not in answer.text


def test_what_is_refused_at_once(service: Secured) -> None:
    ask = service.client()
    loopback = ask.post("/v1/webhooks", json={"url": "https://[::1]/x"})
    assert loopback.status_code == 400 and "MANTA_WEBHOOK_HOSTS" in loopback.json()["hint"]
    assert ask.post("/v1/webhooks", json={"url": "http://127.0.0.1:9/x"}).status_code == 201
    assert ask.post("/v1/webhooks", json={"url": PUBLIC, "events": ["DONE"]}).status_code == 422
    assert ask.post("/v1/webhooks", json={"url": PUBLIC, "events": []}).status_code == 422
    assert ask.post("/v1/webhooks", json={"url": PUBLIC, "secret": "mine"}).status_code == 422
    for _ in range(MOST - 1):
        assert ask.post("/v1/webhooks", json={"url": PUBLIC}).status_code == 201
    full = ask.post("/v1/webhooks", json={"url": PUBLIC})
    assert full.status_code == 409 and full.json()["hint"] == "delete one of them"


def test_the_secret_is_told_once(service: Secured, caplog: pytest.LogCaptureFixture) -> None:
    """Not in answers, logs, errors or the audit log; it does lie in the database, as the documents say."""
    caplog.set_level(logging.DEBUG)
    service.token("root", "admin")
    ask = service.client(service.token("bob", "operator"))
    made = ask.post("/v1/webhooks", json={"url": PUBLIC})
    hook, secret = made.json(), made.json()["secret"]
    assert secret.startswith("whsec_") and len(secret) == 50
    assert made.headers["location"] == f"/v1/webhooks/{hook['id']}" and hook["events"] == [
        "CANCELLED",
        "FAILED",
        "SUCCEEDED",
    ]

    def receive(got: httpx.Request) -> httpx.Response:
        return httpx.Response(500, text=secret)

    service.parts.deliverer._sender._transport = httpx.MockTransport(receive)
    path = f"/v1/webhooks/{hook['id']}"
    answers = [ask.post(f"{path}:test"), ask.get(path), ask.get("/v1/webhooks")]
    service.parts.deliverer.round()
    answers += [ask.get(f"{path}/deliveries"), ask.delete(path), ask.get(path)]
    assert [answer.status_code for answer in answers] == [202, 200, 200, 200, 204, 404]
    assert answers[3].json()["deliveries"][0]["error"] == "got 500, expected 2xx"
    answers.append(service.client(service.token("ann", "admin")).get("/v1/audit"))
    actions = [entry["action"].split("/v1/")[1] for entry in answers[-1].json()["entries"]]
    assert actions == ["webhooks/{webhook_id}", "webhooks/{webhook_id}:test", "webhooks"]
    bare = secret.removeprefix("whsec_")
    assert not any(bare in answer.text for answer in answers) and bare not in caplog.text


def test_deliveries_come_in_pages(service: Secured) -> None:
    ask = service.client()
    hook = ask.post("/v1/webhooks", json={"url": PUBLIC}).json()["id"]
    sent = [ask.post(f"/v1/webhooks/{hook}:test").json()["id"] for _ in range(5)]
    seen, cursor = [], None
    while True:
        wanted = {"limit": 2} | ({} if cursor is None else {"cursor": cursor})
        page = ask.get(f"/v1/webhooks/{hook}/deliveries", params=wanted).json()
        seen += [delivery["id"] for delivery in page["deliveries"]]
        cursor = page["next"]
        if cursor is None:
            break
    assert seen == sent[::-1]


def test_those_of_another_project_are_not_there(service: Secured) -> None:
    service.project("one")
    service.token("root", "admin")
    theirs = service.client(service.token("eve", "admin", "one"))
    hook = service.webhook()
    got = [theirs.get(f"/v1/webhooks/{name}").json() for name in (hook, "hook-none")]
    assert got[0]["detail"].replace(hook, "hook-none") == got[1]["detail"] and got[0]["status"] == 404
    assert theirs.get("/v1/webhooks").json() == {"webhooks": []}
    assert theirs.post("/v1/webhooks?project=default", json={"url": PUBLIC}).status_code == 404
    assert theirs.post("/v1/webhooks", json={"url": PUBLIC}).json()["project"] == "one"


def test_by_command(service: Secured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.httpx, "Client", lambda headers, **_: local_client(service.app, **headers))
    monkeypatch.setenv("MANTA_URL", "http://manta")
    monkeypatch.delenv("MANTA_TOKEN", raising=False)

    def manta(*arguments: str, code: int = 0) -> Result:
        result = runner.invoke(cli.app, ["webhook", *arguments])
        assert result.exit_code == code, (result.output, result.exception)
        return result

    made = manta("create", PUBLIC, "--event", "failed")
    assert made.stdout.startswith("whsec_") and "not shown again" in made.stderr
    (hook,) = json.loads(manta("list", "--json").stdout)
    assert hook["events"] == ["FAILED"] and "secret" not in hook
    assert manta("list").stdout.splitlines()[1].split("\t")[:4] == [hook["id"], "default", PUBLIC, "FAILED"]
    assert "is on its way" in manta("test", hook["id"]).stdout
    assert "webhook.ping" in manta("deliveries", hook["id"]).stdout
    assert manta("delete", hook["id"]).stdout == f"{hook['id']} is deleted\n"
    assert "does not exist" in manta("delete", hook["id"], code=1).stderr
