"""The rules can fail: each finds what is made wrong on purpose in what helm rendered."""

from __future__ import annotations

import base64
from collections.abc import Callable
from typing import Any

import pytest

from tests.helm.chart import Doc, one, render
from tests.helm.properties import ALL, whole_in_itself

Breaks = Callable[[list[Doc]], Any]
OPEN_PORT = {"tcpSocket": {"port": 6380}, "periodSeconds": 5}


def cluster(docs: list[Doc]) -> Doc:
    found: Doc = one(docs, "RayService")["spec"]["rayClusterConfig"]
    return found


def head(docs: list[Doc]) -> Doc:
    found: Doc = cluster(docs)["headGroupSpec"]["template"]
    return found


def worker(docs: list[Doc]) -> Doc:
    found: Doc = cluster(docs)["workerGroupSpecs"][0]["template"]
    return found


def home(docs: list[Doc]) -> Doc:
    return next(volume for volume in head(docs)["spec"]["volumes"] if volume["name"] == "home")


def container(template: Doc) -> Doc:
    found: Doc = template["spec"]["containers"][0]
    return found


def confine(template: Doc) -> Doc:
    found: Doc = container(template)["securityContext"]
    return found


def variable(template: Doc, name: str) -> Doc:
    return next(v for v in container(template)["env"] if v["name"] == name)


def secret_of(template: Doc) -> Doc:
    found: Doc = variable(template, "MANTA_DATABASE_URL")["valueFrom"]["secretKeyRef"]
    return found


def database(docs: list[Doc]) -> Doc:
    found: Doc = one(docs, "StatefulSet", "-postgres")["spec"]["template"]
    return found


def policy(docs: list[Doc], ends: str) -> Doc:
    found: Doc = one(docs, "NetworkPolicy", ends)["spec"]
    return found


def backend(docs: list[Doc]) -> Doc:
    found: Doc = one(docs, "Ingress")["spec"]["rules"][0]["http"]["paths"][0]["backend"]["service"]
    return found


def opened(docs: list[Doc], rule: int, port: int) -> None:
    policy(docs, "-ray")["ingress"][rule]["ports"].append({"protocol": "TCP", "port": port})


def held(docs: list[Doc]) -> Doc:
    found: Doc = one(docs, "PodDisruptionBudget")["spec"]
    return found


def reselect(docs: list[Doc], ends: str, component: str) -> None:
    release = {"app.kubernetes.io/instance": "lab"}
    one(docs, "Service", ends)["spec"]["selector"] = release | {"app.kubernetes.io/component": component}


def service_of(kind: str) -> Doc:
    return {"kind": "Service", "metadata": {"name": "open"}, "spec": {"type": kind, "ports": [{"port": 8265}]}}


def role_of(resource: str) -> Doc:
    return {"kind": "Role", "metadata": {"name": "x"}, "rules": [{"resources": [resource]}]}


def plain(docs: list[Doc]) -> str:
    return base64.b64decode(one(docs, "Secret", "-tokens")["data"]["auth_token"]).decode()


WRONG: list[tuple[str, str, Breaks]] = [
    ("confined", "root", lambda d: head(d)["spec"]["securityContext"].update(runAsNonRoot=False)),
    ("confined", "root", lambda d: worker(d)["spec"]["securityContext"].update(runAsUser=0)),
    ("confined", "root", lambda d: database(d)["spec"].pop("securityContext")),
    ("confined", "seccomp", lambda d: worker(d)["spec"]["securityContext"].pop("seccompProfile")),
    ("confined", "privileges", lambda d: confine(worker(d)).update(capabilities={"add": ["NET_ADMIN"]})),
    ("confined", "privileges", lambda d: container(head(d)).pop("securityContext")),
    ("confined", "takes", lambda d: confine(head(d)).update(privileged=True)),
    ("confined", "root file system", lambda d: confine(database(d)).update(readOnlyRootFilesystem=False)),
    ("confined", "autoscaler", lambda d: cluster(d)["autoscalerOptions"].pop("securityContext")),
    ("confined", "hostNetwork", lambda d: worker(d)["spec"].update(hostNetwork=True)),
    ("confined", "host", lambda d: head(d)["spec"]["volumes"].append({"name": "x", "hostPath": {"path": "/"}})),
    ("pinned", "latest", lambda d: container(worker(d)).update(image="manta:latest")),
    ("pinned", "manta", lambda d: container(worker(d)).update(image="registry:5000/manta")),
    ("pinned", "postgres", lambda d: container(database(d)).update(image="postgres")),
    ("probed", "readinessProbe", lambda d: container(worker(d)).pop("readinessProbe")),
    ("probed", "livenessProbe", lambda d: container(head(d)).pop("livenessProbe")),
    (
        "probed",
        "takes requests",
        lambda d: container(worker(d)).update(readinessProbe=OPEN_PORT),
    ),
    ("probed", "takes requests", lambda d: container(head(d))["readinessProbe"]["httpGet"].update(path="/")),
    ("probed", "takes requests", lambda d: container(database(d))["readinessProbe"]["exec"].update(command=["true"])),
    ("probed", "too long", lambda d: container(worker(d))["readinessProbe"].update(failureThreshold=600)),
    ("probed", "too short", lambda d: container(head(d))["startupProbe"].update(failureThreshold=1)),
    ("probed", "slow", lambda d: container(worker(d)).update(livenessProbe=container(worker(d))["readinessProbe"])),
    ("probed", "slow", lambda d: container(worker(d))["livenessProbe"].update(failureThreshold=3)),
    ("graceful", "drain", lambda d: worker(d)["spec"].update(terminationGracePeriodSeconds=30)),
    ("graceful", "drain", lambda d: worker(d)["spec"].pop("terminationGracePeriodSeconds")),
    ("graceful", "checkpoint", lambda d: variable(head(d), "RAY_JOB_STOP_WAIT_TIME_S").update(value="9999")),
    ("bounded", "limits of memory", lambda d: container(worker(d))["resources"]["limits"].pop("memory")),
    ("bounded", "requests of cpu", lambda d: container(database(d)).pop("resources")),
    ("bounded", "fill the node", lambda d: head(d)["spec"]["volumes"][0].update(emptyDir={})),
    ("bounded", "ray-logs", lambda d: head(d)["spec"].update(volumes=[])),
    ("closed", "others than the head", lambda d: one(d, "RayService")["spec"].pop("serveService")),
    ("closed", "open to the outside", lambda d: d.append(service_of("NodePort"))),
    ("closed", "open to the outside", lambda d: one(d, "Service", "-postgres")["spec"].update(type="LoadBalancer")),
    ("closed", "head's Service", lambda d: cluster(d)["headGroupSpec"].update(serviceType="NodePort")),
    ("closed", "Ingress leads", lambda d: backend(d).update(port={"number": 8265})),
    ("closed", "port of the host", lambda d: container(worker(d))["ports"].append({"containerPort": 1, "hostPort": 1})),
    ("closed", "not denied", lambda d: d.remove(one(d, "NetworkPolicy", "-default-deny"))),
    ("closed", "by anybody", lambda d: policy(d, "-ray")["ingress"][0].pop("from")),
    ("closed", "other pods", lambda d: policy(d, "-redis")["ingress"][0].update({"from": [{"podSelector": {}}]})),
    ("closed", "from outside", lambda d: opened(d, rule=2, port=8265)),
    ("closed", "every port", lambda d: policy(d, "-ray")["ingress"][2].pop("ports")),
    ("closed", "from outside", lambda d: opened(d, rule=1, port=6379)),
    ("answered", "which does not listen at 8000", lambda d: one(d, "RayService")["spec"].pop("serveService")),
    ("answered", "submitter, which does not listen at 8080", lambda d: reselect(d, "lab-manta-metrics", "ray")),
    ("answered", "which does not listen at 8080", lambda d: container(worker(d)).pop("ports")),
    ("answered", "postgres has nothing", lambda d: reselect(d, "-postgres", "database")),
    ("answered", "redis has nothing", lambda d: reselect(d, "-redis", "store")),
    ("answered", "frontend-metrics has nothing", lambda d: reselect(d, "-frontend-metrics", "front")),
    ("used", "holds []", lambda d: held(d)["selector"]["matchLabels"].update({"manta-head": "none"})),
    ("used", "group cpu", lambda d: held(d)["selector"]["matchLabels"].pop("manta-head")),
    ("used", "no pod has", lambda d: one(d, "PriorityClass", "-training")["metadata"].update(name="x")),
    ("used", "is not there", lambda d: d.remove(one(d, "PriorityClass", "-training"))),
    ("used", "below -10", lambda d: one(d, "PriorityClass", "-training").update(value=-11)),
    ("secret", "in the clear", lambda d: container(head(d))["env"].append({"name": "RAY_AUTH_TOKEN", "value": "x"})),
    ("secret", "value of a Secret", lambda d: container(head(d)).update(args=["--token", plain(d)])),
    ("secret", "value of a Secret", lambda d: one(d, "ConfigMap", "-job")["data"].update(token=plain(d))),
    (
        "secret",
        "URL with a password",
        lambda d: container(head(d))["env"].append({"name": "X", "value": "redis://u:p@h:1"}),
    ),
    ("named", "no name", lambda d: one(d, "RayService")["metadata"].update(name="a" * 48)),
    ("named", "no name", lambda d: one(d, "Ingress")["metadata"].update(name="Upper")),
    ("named", "no name", lambda d: one(d, "Service", "-redis")["metadata"].update(name="1-redis")),
    ("named", "no name", lambda d: one(d, "StatefulSet", "-redis")["metadata"].update(name="a.b-redis")),
    ("named", "label", lambda d: one(d, "Ingress")["metadata"]["labels"].update(x="a" * 64)),
    ("named", "twice", lambda d: d.append(one(d, "Ingress"))),
    ("kept", "goes with the release", lambda d: one(d, "Secret", "-redis")["metadata"].pop("annotations")),
    ("kept", "goes with the release", lambda d: one(d, "PersistentVolumeClaim")["metadata"].pop("annotations")),
    ("least", "API server", lambda d: worker(d)["spec"].update(automountServiceAccountToken=True)),
    ("least", "whole cluster", lambda d: d.append({"kind": "ClusterRole", "metadata": {"name": "x"}, "rules": []})),
    ("least", "allows", lambda d: d.append(role_of("secrets"))),
]


def every() -> list[Doc]:
    """A case with an Ingress, Redis and PostgreSQL."""
    return render("high-availability", 'database={"mode":"bundled","external":{"existingSecret":""}}')


def test_all_is_right_before() -> None:
    assert [problem for rule in ALL.values() for problem in rule(every())] == []


@pytest.mark.parametrize(("rule", "says", "breaks"), WRONG, ids=[f"{r}-{i}" for i, (r, _, _) in enumerate(WRONG)])
def test_each_rule_finds_what_breaks_it(rule: str, says: str, breaks: Breaks) -> None:
    docs = every()
    breaks(docs)
    assert any(says in problem for problem in ALL[rule](docs)), list(ALL[rule](docs))


def test_each_rule_is_tried() -> None:
    assert {rule for rule, _, _ in WRONG} == set(ALL)


def test_the_httproute_is_looked_at() -> None:
    docs = render("external-services")
    one(docs, "HTTPRoute")["spec"]["rules"][0]["backendRefs"][0]["port"] = 8265
    assert any("HTTPRoute leads" in problem for problem in ALL["closed"](docs))


@pytest.mark.parametrize(
    ("says", "breaks"),
    [
        ("Secret other", lambda d: secret_of(head(d)).update(name="other")),
        ("Claim other", lambda d: home(d)["persistentVolumeClaim"].update(claimName="other")),
        ("ServiceAccount other", lambda d: worker(d)["spec"].update(serviceAccountName="other")),
        ("which is no volume", lambda d: container(worker(d))["volumeMounts"].append({"name": "x", "mountPath": "/x"})),
        ("Secret keys", lambda d: container(worker(d)).update(envFrom=[{"secretRef": {"name": "keys"}}])),
    ],
)
def test_names_that_lead_nowhere_are_found(says: str, breaks: Breaks) -> None:
    docs = every()
    breaks(docs)
    assert any(says in problem for problem in whole_in_itself(docs))
