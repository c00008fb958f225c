"""What the real helm makes of the chart: lint, schemas of Kubernetes and KubeRay, rules, names, pods."""

from __future__ import annotations

import json
import shlex
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import yaml

from service.app import application
from service.settings import Settings
from tests.helm import kuberay
from tests.helm.chart import (
    CASES,
    CHART,
    helm,
    job_template,
    load,
    of_kind,
    one,
    pods,
    render,
    rendered_files,
    whole,
)
from tests.helm.properties import ALL, whole_in_itself

VERSIONS = ("1.30", "1.33", "1.36")
# Of other projects: the cases that have them; their schemas may be put into the folder of KubeRay's.
CUSTOM = {
    "ServiceMonitor": "high-availability",
    "PrometheusRule": "high-availability",
    "HTTPRoute": "external-services",
}
WITHOUT_SCHEMA = {"RayService", "RayJob", *CUSTOM}
LONG = "a-release-with-the-longest-name-that-helm-itself-take"  # 53 characters
EXTERNAL = frozenset(
    {"bucket-keys", "minio-keys", "manta-database", "manta-redis", "manta-tokens", "imagenet", "lustre"}
)
ACCOUNTS = frozenset({"manta-head", "manta-worker"})  # of the case without accounts of its own


@pytest.mark.parametrize("case", CASES)
def test_helm_lint_has_nothing_to_say(case: str) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, "--values", CASES[case])


@cache
def _validate(document: str, version: str) -> None:
    kubernetes_validate = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    kubernetes_validate.validate(json.loads(document), version, strict=True)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("case", CASES)
def test_kubernetes_takes_each_object(case: str, version: str) -> None:
    """Strictly: unknown fields are errors. Pods of custom resources are looked at as pods."""
    docs = [doc for doc in render(case) if doc["kind"] not in WITHOUT_SCHEMA]
    for pod in pods(render(case)):
        docs.append({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "p"} | pod.metadata, "spec": pod.spec})
    for doc in docs:
        _validate(json.dumps(doc), version)


@pytest.mark.parametrize("case", CASES)
def test_kuberay_takes_its_resources(case: str) -> None:
    resources = [doc for doc in whole(render(case)) if doc["apiVersion"] == "ray.io/v1"]
    assert {doc["kind"] for doc in resources} == {"RayService", "RayJob"}
    assert [problem for doc in resources for problem in kuberay.problems(doc)] == []


@pytest.mark.parametrize("kind", CUSTOM)
def test_other_projects_take_their_resources(kind: str) -> None:
    found = of_kind(render(CUSTOM[kind]), kind)
    assert found
    assert [problem for doc in found for problem in kuberay.problems(doc)] == []


def test_the_oldest_kubernetes_that_the_chart_takes_is_validated() -> None:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert chart["kubeVersion"] == f">={VERSIONS[0]}.0-0"
    readme = (CHART / "README.md").read_text()
    assert f"Kubernetes {VERSIONS[0]} or newer" in readme
    assert "schemas of Kubernetes {}, {} and {} |".format(*VERSIONS) in readme


def test_the_schemas_of_kuberay_find_what_is_wrong() -> None:
    service = one(render("minimal"), "RayService")
    service["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]["imagePullPolicie"] = (
        "Always"
    )
    service["spec"]["rayClusterConfig"]["authOptions"]["mode"] = "open"
    assert len(kuberay.problems(service)) == 2


@pytest.mark.parametrize("rule", ALL)
@pytest.mark.parametrize("case", CASES)
def test_each_case_keeps_each_rule(case: str, rule: str) -> None:
    assert list(ALL[rule](render(case))) == []


@pytest.mark.parametrize("case", CASES)
def test_what_pods_name_is_there(case: str) -> None:
    given = EXTERNAL | (ACCOUNTS if case == "external-services" else frozenset())
    assert list(whole_in_itself(render(case), given)) == []
    assert case in ("minimal", "kueue") or list(whole_in_itself(render(case))) != []  # the check sees them


@pytest.mark.parametrize("case", CASES)
def test_long_names_of_releases_fit(case: str) -> None:
    assert len(LONG) == 53
    docs = render(case, release=LONG)
    assert [problem for rule in ("named", "closed") for problem in ALL[rule](docs)] == []
    assert list(whole_in_itself(docs, EXTERNAL | ACCOUNTS)) == []


def test_two_long_releases_do_not_meet() -> None:
    names = {one(render("minimal", release=LONG[:-1] + end), "RayService")["metadata"]["name"] for end in "ab"}
    assert len(names) == 2


def test_the_cases_use_every_template() -> None:
    used = {file for case in CASES for file in rendered_files(case)}
    there = {str(path.relative_to(CHART)) for path in (CHART / "templates").rglob("*.yaml")}
    assert used == there


def test_the_settings_that_the_front_end_gets_are_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(one(render("gpu-spot"), "RayService")["spec"]["serveConfigV2"])
    (app,) = config["applications"]
    for name, value in app["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert [(group.count, group.resources) for group in settings.cluster_nodes] == [
        (4, {"CPU": 8, "GPU": 0}),
        (4, {"CPU": 96, "GPU": 8, "h100": 8}),
        (16, {"CPU": 16, "GPU": 1}),
    ]
    assert (settings.host, settings.tokens, settings.stop_grace_s) == ("0.0.0.0", "required", 90)
    assert settings.allowed_roots == ("s3://training-data", "/data/imagenet")
    assert settings.mirror_roots == ("s3://checkpoints",)
    assert str(settings.first_admin_token_file) == "/etc/manta/admin_token"


@pytest.mark.parametrize("case", CASES)
def test_ray_serve_takes_the_config(case: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(one(render(case), "RayService")["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    own = yaml.safe_load((CHART.parents[1] / "cluster" / "serve.yaml").read_text())
    assert (config.proxy_location, config.http_options.port) == (own["proxy_location"], own["http_options"]["port"])
    assert own["applications"][0]["runtime_env"]["env_vars"].items() <= app.runtime_env["env_vars"].items()


def test_commands_exist() -> None:
    docs = render("minimal")
    commands = [
        shlex.split(job_template(docs)["spec"]["entrypoint"]),
        one(docs, "Pod")["spec"]["containers"][0]["command"],
    ]
    for command in commands:
        assert command[:2] == ["python", "-m"] and find_spec(command[2])


def test_jobs_wait_in_the_queue_and_the_service_does_not() -> None:
    docs = render("kueue")
    labels = job_template(docs)["metadata"]["labels"]
    assert labels["kueue.x-k8s.io/queue-name"] == "training" and labels["kueue.x-k8s.io/priority-class"] == "research"
    assert not any("kueue" in label for label in one(docs, "RayService")["metadata"]["labels"])
    assert job_template(docs)["spec"]["rayClusterSpec"]["enableInTreeAutoscaling"] is False  # admitted as a whole


def test_redis_keeps_what_ray_was_told() -> None:
    docs = render("high-availability")
    options = one(docs, "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    service = one(docs, "Service", "-redis")
    assert options["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert options["redisPassword"]["valueFrom"]["secretKeyRef"] == {
        "name": service["metadata"]["name"],
        "key": "password",
    }
    external = one(render("external-services"), "RayService")["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert external["redisAddress"] == "rediss://redis.example.org:6380"
    assert "gcsFaultToleranceOptions" not in one(render("minimal"), "RayService")["spec"]["rayClusterConfig"]


def test_external_services_may_be_reached() -> None:
    policy = one(render("external-services"), "NetworkPolicy", "-ray")["spec"]
    ports = {port["port"] for rule in policy["egress"] for port in rule.get("ports", [])}
    assert {6432, 6380, 443} <= ports
    assert not of_kind(render("external-services"), "StatefulSet")


def test_duplicate_keys_are_seen() -> None:
    with pytest.raises(ValueError, match="duplicate keys \\['a'\\]"):
        load("b:\n  a: 1\n  a: 2\n")
    for case in CASES:
        _check_text(render(case))


def _check_text(docs: list[dict[str, Any]]) -> None:
    """YAML inside of YAML has no duplicate keys either."""
    for doc in of_kind(docs, "RayService"):
        load(doc["spec"]["serveConfigV2"])
