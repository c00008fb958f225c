"""Who may do what: the roles allow what is asked by those who have them, and nothing more is asked."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service import kubernetes
from tests.helm.chart import Doc, of_kind, one, render
from tests.service.test_kubernetes import job

OF_KIND = {"configmaps": ("", "configmaps"), "RayJob": ("ray.io", "rayjobs")}


def asked_of_kubectl(docs: list[Doc], monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str, str]]:
    """Verb, API group and resource of all that `manta submit --k8s` asks, with the chart's own template."""
    asked = set()

    def kubectl(verb: str, *rest: str, given: str | None = None) -> str:
        if verb == "get":  # by a selector: the API server calls that list
            assert "--selector" in rest
            asked.add(("list", *OF_KIND[rest[0]]))
            return json.dumps({"items": [one(docs, "ConfigMap", "-job")]})
        asked.add((verb, *OF_KIND[json.loads(given or "")["kind"]]))
        return ""

    monkeypatch.setattr(kubernetes, "_kubectl", kubectl)
    kubernetes.submit(job())
    return asked


def allowed(role: Doc) -> set[tuple[str, str, str]]:
    return {
        (verb, group, resource)
        for rule in role["rules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
    }


def test_submitters_may_do_what_the_command_asks(monkeypatch: pytest.MonkeyPatch) -> None:
    docs = render("kueue")
    asked = asked_of_kubectl(docs, monkeypatch)
    assert asked == {("list", "", "configmaps"), ("create", "ray.io", "rayjobs")}
    more = {(verb, "ray.io", "rayjobs") for verb in ("get", "list", "watch", "delete")}  # to follow it and to end it
    assert allowed(one(docs, "Role")) == asked | more


def test_the_role_is_given_to_the_submitters_of_the_values() -> None:
    docs = render("kueue")
    binding: Any = one(docs, "RoleBinding")
    assert binding["roleRef"]["name"] == one(docs, "Role")["metadata"]["name"]
    assert [(subject["kind"], subject["name"]) for subject in binding["subjects"]] == [
        ("Group", "researchers"),
        ("ServiceAccount", "ci"),
    ]
    assert all("namespace" in subject for subject in binding["subjects"] if subject["kind"] == "ServiceAccount")
    assert not of_kind(render("minimal"), "Role")
