"""Who may talk to whom, in both directions; each hole and each closed way is found."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from tests.helm.chart import CASES, Doc, of_kind, one, render, values
from tests.helm.network import problems

CASE = "high-availability"  # both bundled stores, an Ingress, a Prometheus
BUNDLED = 'database={"mode":"bundled","external":{"existingSecret":""}}'


def policy(docs: list[Doc], ends: str) -> Doc:
    found: Doc = one(docs, "NetworkPolicy", ends)["spec"]
    return found


def given() -> Doc:
    found = values(CASE)
    found["database"]["mode"] = "bundled"
    return found


@pytest.mark.parametrize("case", CASES)
def test_what_must_be_reached_is_and_nothing_else(case: str) -> None:
    assert list(problems(render(case), values(case))) == []


def _unprotect(docs: list[Doc]) -> None:
    docs[:] = [doc for doc in docs if doc["kind"] != "NetworkPolicy"]


CASES_OF_BREAKING: list[tuple[str, Callable[[list[Doc]], Any]]] = [
    ("cannot reach a pod of kube-system at UDP 53", lambda d: policy(d, "-default-deny").update(egress=[])),
    ("cannot reach NodeLocal DNSCache", lambda d: policy(d, "-default-deny")["egress"][0]["to"].pop(1)),
    ("at TCP 53", lambda d: policy(d, "-default-deny")["egress"][0]["ports"].pop(1)),
    ("head cannot reach RayService lab-manta, group cpu", lambda d: policy(d, "-ray")["ingress"].pop(0)),
    ("group cpu cannot reach RayService lab-manta, head", lambda d: policy(d, "-ray")["egress"].pop(0)),
    ("kuberay cannot reach", lambda d: policy(d, "-ray")["ingress"].pop(1)),
    ("kuberay cannot reach RayService lab-manta, head at TCP 8265", lambda d: _unport(d, 1, 8265)),
    ("test cannot reach", lambda d: policy(d, "-ray")["ingress"][2]["from"].pop(0)),
    ("test cannot reach", lambda d: policy(d, "-test")["egress"].pop(0)),
    ("ingress-nginx cannot reach", lambda d: policy(d, "-ray")["ingress"][2]["from"].pop(1)),
    ("monitoring cannot reach", lambda d: policy(d, "-ray")["ingress"].pop(3)),
    ("cannot reach StatefulSet lab-manta-postgres", lambda d: policy(d, "-postgres").update(ingress=[])),
    ("cannot reach StatefulSet lab-manta-redis", lambda d: policy(d, "-redis").update(ingress=[])),
    ("cannot reach the API server", lambda d: policy(d, "-ray")["egress"].pop()),
    ("head reaches the internet at TCP 25", lambda d: policy(d, "-ray").update(egress=[{}])),
    ("test reaches the internet", lambda d: policy(d, "-test").update(egress=[{}])),
    ("postgres reaches the internet", lambda d: policy(d, "-default-deny")["egress"].append({})),
    ("redis reaches the internet at TCP 443", lambda d: policy(d, "-default-deny")["egress"].append(_https())),
    ("reaches the internet at TCP 53", lambda d: policy(d, "-default-deny")["egress"][0].pop("to")),
    ("ingress-nginx reaches RayService lab-manta, head at TCP 8080", lambda d: _port(d, 2, 8080)),
    ("monitoring reaches RayService lab-manta, head at TCP 8265", lambda d: _port(d, 3, 8265)),
    ("kuberay reaches RayService lab-manta, head at TCP 6379", lambda d: _port(d, 1, 6379)),
    ("research reaches", lambda d: policy(d, "-ray")["ingress"][0]["from"].append({"podSelector": {}})),
    ("the internet reaches", lambda d: policy(d, "-ray")["ingress"][2].pop("from")),
    ("a pod of default reaches", lambda d: policy(d, "-redis")["ingress"].append({})),
    ("research reaches StatefulSet lab-manta-postgres", lambda d: policy(d, "-postgres")["ingress"][0].pop("from")),
    ("the internet reaches", _unprotect),
]


def _port(docs: list[Doc], rule: int, port: int) -> None:
    policy(docs, "-ray")["ingress"][rule]["ports"].append({"protocol": "TCP", "port": port})


def _unport(docs: list[Doc], rule: int, port: int) -> None:
    policy(docs, "-ray")["ingress"][rule]["ports"].remove({"protocol": "TCP", "port": port})


def _https() -> Doc:
    return {"ports": [{"protocol": "TCP", "port": 443}]}


@pytest.mark.parametrize(("says", "breaks"), CASES_OF_BREAKING, ids=[f"{i}" for i in range(len(CASES_OF_BREAKING))])
def test_each_hole_and_each_closed_way_is_found(says: str, breaks: Callable[[list[Doc]], Any]) -> None:
    docs = render(CASE, BUNDLED)
    assert list(problems(docs, given())) == []
    breaks(docs)
    assert any(says in problem for problem in problems(docs, given())), list(problems(docs, given()))[:5]


@pytest.mark.parametrize("port", [6432, 6380])
def test_external_stores_that_cannot_be_reached_are_found(port: int) -> None:
    docs = render("external-services")
    rules = policy(docs, "-ray")["egress"]
    rules.remove({"ports": [{"protocol": "TCP", "port": port}]})
    assert f"head cannot reach the internet at TCP {port}" in "\n".join(problems(docs, values("external-services")))


def test_ways_out_that_the_values_open_are_open_for_ray_and_for_the_test() -> None:
    """A resolver on an address of its own: every pod that looks up a name needs it."""
    rule = '{"to":[{"ipBlock":{"cidr":"10.8.0.2/32"}}],"ports":[{"protocol":"UDP","port":53}]}'
    docs = render("minimal", f"networkPolicy.egress=[{rule}]")
    opened = [doc["metadata"]["name"] for doc in of_kind(docs, "NetworkPolicy") if "10.8.0.2" in str(doc)]
    assert opened == ["lab-manta-ray", "lab-manta-test"]
