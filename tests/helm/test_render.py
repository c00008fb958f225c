"""What the real helm makes of the chart: lint, schemas of Kubernetes and KubeRay, rules, refusals, notes, upgrades."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.access import RULES
from service.app import application
from service.settings import Settings
from tests.helm import kuberay
from tests.helm.chart import (
    CASES,
    CHART,
    NAMESPACE,
    RELEASE,
    arguments,
    helm,
    job_template,
    load,
    of_kind,
    one,
    pods,
    render,
    rendered_files,
    values,
    whole,
)
from tests.helm.properties import ALL, whole_in_itself

VERSIONS = ("1.30", "1.33", "1.36")
WITHOUT_SCHEMA = {"RayService", "RayJob", "ServiceMonitor", "PrometheusRule", "HTTPRoute"}  # of other projects
LONG = "a-release-with-the-longest-name-that-helm-itself-take"  # 53 characters
EXTERNAL = frozenset(
    {"bucket-keys", "minio-keys", "manta-database", "manta-redis", "manta-tokens", "imagenet", "lustre"}
)
ACCOUNTS = frozenset({"manta-head", "manta-worker"})  # of the case without accounts of its own


GROUP = '{"name":"a","minReplicas":0,"maxReplicas":2,"cpus":1,"memory":"1Gi","nodeSelector":{"a":"b"}}'


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


@pytest.mark.parametrize(
    ("sets", "says"),
    [
        (('image.repository=""',), "build and push"),
        (('database.mode="external"',), "database.external.existingSecret"),
        (('database.external.existingSecret="x"',), "set database.mode to external"),
        (('gcs.faultTolerance="external"',), "gcs.external.address"),
        (('gcs.faultTolerance="external"', 'gcs.external.address="h:1"'), "set both"),
        (('workers=[{"name":"a","minReplicas":3,"maxReplicas":2,"cpus":1,"memory":"1Gi"}]',), "swap them"),
        (("autoscaling.enabled=false",), "would never have a pod"),
        (('ingress={"enabled":true,"tlsSecret":"x"}',), "ingress.host"),
        (('ingress={"enabled":true,"host":"m.example.org"}',), "in the clear"),
        (('ingress={"enabled":true,"host":"m.example.org","tlsSecret":"x"}',), "networkPolicy.frontendFrom is empty"),
        (("gateway.enabled=true",), "gateway.parent.name"),
        (("monitoring.serviceMonitor=true",), "networkPolicy.metricsFrom"),
        (("serviceAccount.create=false",), "serviceAccount.headName"),
        (('kueue.priorityClass="high"',), "kueue.queue"),
        (
            (
                'storage.home.accessMode="ReadWriteOnce"',
                f"workers=[{GROUP}]",
            ),
            "use ReadWriteMany",
        ),
        (
            (f"workers=[{GROUP},{GROUP}]",),
            "two groups named a",
        ),
        (('workers=[{"name":"a","minReplicas":0,"maxReplicas":2,"cpus":1,"memory":"1Gi","custom":{"GPU":1}}]',), "GPU"),
        (('image.tag="latest"',), "image.tag"),
        (("unknown=1",), "unknown"),
    ],
)
def test_what_cannot_work_is_refused_with_a_sentence(sets: tuple[str, ...], says: str) -> None:
    assert says in helm("template", *arguments("minimal", sets), code=1)


def test_the_settings_that_the_front_end_gets_are_read_by_it(monkeypatch: pytest.MonkeyPatch) -> None:
    config = yaml.safe_load(one(render("gpu-spot"), "RayService")["spec"]["serveConfigV2"])
    (app,) = config["applications"]
    for name, value in app["runtime_env"]["env_vars"].items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert (settings.cluster_cpus, settings.cluster_gpus) == (4 * 8 + 4 * 96 + 16 * 16, 4 * 8 + 16)
    assert settings.cluster_custom == {"h100": 4 * 8}
    assert (settings.host, settings.tokens, settings.stop_grace_s) == ("0.0.0.0", "required", 90)
    assert settings.allowed_roots == ("s3://training-data", "/data/imagenet")
    assert settings.mirror_roots == ("s3://checkpoints",)
    assert str(settings.first_admin_token_file) == "/etc/manta/admin_token"


def test_rays_autoscaler_sees_the_custom_resources_of_a_group() -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    groups = one(render("gpu-spot"), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    seen = [autoscaling_config._get_ray_resources_from_group_spec(group, is_head=False) for group in groups]
    assert [one.get("h100", 0) for one in seen] == [0, 8, 0]
    assert (seen[1]["CPU"], seen[1]["GPU"]) == (96, 8)


@pytest.mark.parametrize("case", CASES)
def test_ray_serve_takes_the_config(case: str) -> None:
    from ray.serve.schema import ServeDeploySchema

    config = ServeDeploySchema.model_validate(yaml.safe_load(one(render(case), "RayService")["spec"]["serveConfigV2"]))
    (app,) = config.applications
    assert app.import_path == f"{application.__module__}:{application.__name__}"
    own = yaml.safe_load((CHART.parents[1] / "cluster" / "serve.yaml").read_text())
    assert (config.proxy_location, config.http_options.port) == (own["proxy_location"], own["http_options"]["port"])
    assert own["applications"][0]["runtime_env"]["env_vars"].items() <= app.runtime_env["env_vars"].items()


def test_variables_of_pods_are_of_the_service_of_ray_or_of_a_library() -> None:
    for case in CASES:
        for pod in pods(render(case)):
            for container in pod.spec["containers"]:
                names = {variable["name"] for variable in container.get("env", [])}
                ours = {name.removeprefix("MANTA_").lower() for name in names if name.startswith("MANTA_")}
                assert ours <= set(Settings.model_fields)
                assert pod.role == "head" or ours <= {"home"}, "workers have no use for the database"


def test_the_database_is_told_to_the_head_of_the_service_alone() -> None:
    for case in CASES:
        with_url = [pod.where for pod in pods(render(case)) if "MANTA_DATABASE_URL" in str(pod.spec)]
        assert len(with_url) == 1 and "RayService" in with_url[0]
        with_admin = [pod.where for pod in pods(render(case)) if "admin_token" in str(pod.spec)]
        assert with_admin == with_url


def test_commands_exist() -> None:
    docs = render("minimal")
    commands = [
        shlex.split(job_template(docs)["spec"]["entrypoint"]),
        one(docs, "Pod")["spec"]["containers"][0]["command"],
    ]
    for command in commands:
        assert command[:2] == ["python", "-m"] and find_spec(command[2])


def test_groups_become_what_their_values_say() -> None:
    spec = one(render("gpu-spot"), "RayService")["spec"]["rayClusterConfig"]
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    pod = {name: group["template"]["spec"] for name, group in groups.items()}
    assert {name: (g["minReplicas"], g["maxReplicas"]) for name, g in groups.items()} == {
        "cpu": (0, 4),
        "h100": (0, 4),
        "l4-spot": (0, 16),
    }
    assert [pod[name]["containers"][0]["image"].rpartition("-")[2] for name in groups] == ["cpu", "cuda", "cuda"]
    assert pod["h100"]["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 8
    taints = [t["key"] for t in pod["l4-spot"]["tolerations"]]
    assert taints == ["team", "cloud.google.com/gke-spot", "nvidia.com/gpu"]
    assert pod["l4-spot"]["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4",
        "cloud.google.com/gke-spot": "true",
    }
    assert (
        "tolerations" not in pod["cpu"] and "nvidia.com/gpu" not in pod["cpu"]["containers"][0]["resources"]["limits"]
    )
    assert pod["h100"]["topologySpreadConstraints"][0]["topologyKey"] == "topology.kubernetes.io/zone"
    assert spec["autoscalerOptions"]["idleTimeoutSeconds"] == 600 and spec["enableInTreeAutoscaling"] is True


def test_the_head_gives_out_no_cores() -> None:
    for case in CASES:
        assert (
            one(render(case), "RayService")["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"]
            == "0"
        )


def test_without_autoscaling_groups_have_one_size() -> None:
    spec = one(render("air-gapped"), "RayService")["spec"]["rayClusterConfig"]
    assert [(g["replicas"], g["minReplicas"], g["maxReplicas"]) for g in spec["workerGroupSpecs"]] == [(1, 1, 1)]
    assert spec["enableInTreeAutoscaling"] is False and "autoscalerOptions" not in spec
    assert spec["headGroupSpec"]["template"]["spec"]["automountServiceAccountToken"] is False


def test_every_image_comes_from_the_registry_of_the_site() -> None:
    images = {c["image"] for pod in pods(render("air-gapped")) for c in pod.spec["containers"]}
    assert len(images) == 4 and all(image.startswith("mirror.site.example:5000/proxy/") for image in images)
    assert sum("@sha256:" in image for image in images) == 2


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


def test_rules_are_of_this_release() -> None:
    rules = one(render("high-availability"), "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert len(rules) > 4 and all(f'namespace="{NAMESPACE}"' in rule["expr"] for rule in rules)
    assert all(rule["annotations"]["description"] and rule["labels"]["severity"] for rule in rules)


def notes_of(case: str, folder: Path) -> str:
    """helm prints them only with a cluster at hand, so a copy of the chart has them in a ConfigMap."""
    shutil.copytree(CHART, folder / "manta")
    (folder / "manta" / "templates" / "NOTES.txt").rename(folder / "manta" / "notes.tpl")
    text = '{{ tpl (.Files.Get "notes.tpl") . | quote }}'
    notes = folder / "manta" / "templates" / "notes.yaml"
    notes.write_text(f"kind: ConfigMap\nmetadata: {{name: notes}}\ndata:\n  notes: {text}\n")
    release, _, *more = arguments(case)
    (rendered,) = load(helm("template", release, folder / "manta", *more, "--show-only", "templates/notes.yaml"))
    found: str = rendered["data"]["notes"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_commands_of_the_notes_name_what_is_there(case: str, tmp_path: Path) -> None:
    notes = notes_of(case, tmp_path)
    docs = render(case)
    there = {(doc["kind"].lower(), doc["metadata"]["name"]) for doc in docs}
    service = one(docs, "RayService")["metadata"]["name"]
    by_kuberay = {("service", f"{service}-serve-svc")}
    named = set(re.findall(r"\b(rayservice|service|secret)/([a-z0-9-]+)", notes))
    assert named and named <= there | by_kuberay | {("secret", name) for name in EXTERNAL}
    assert f"helm --namespace {NAMESPACE} test {RELEASE}" in notes
    assert ("port-forward" in notes) == (case not in ("high-availability", "external-services"))
    host = values(case)["ingress"]["host"] or values(case)["gateway"]["host"]
    assert f"MANTA_URL={f'https://{host}' if host else 'http://127.0.0.1:8000'}\n" in notes
    assert "MANTA_TOKEN" in (CHART.parents[1] / "service" / "terminal.py").read_text()  # the command line takes it
    assert ("no data yet" in notes) == (not values(case)["frontend"]["allowedRoots"])


def test_duplicate_keys_are_seen() -> None:
    with pytest.raises(ValueError, match="duplicate keys \\['a'\\]"):
        load("b:\n  a: 1\n  a: 2\n")
    for case in CASES:
        _check_text(render(case))


def _check_text(docs: list[dict[str, Any]]) -> None:
    """YAML inside of YAML has no duplicate keys either."""
    for doc in of_kind(docs, "RayService"):
        load(doc["spec"]["serveConfigV2"])


def test_the_names_in_the_readme_are_those_of_its_release() -> None:
    readme = (CHART / "README.md").read_text()
    docs = render("minimal", 'gcs.faultTolerance="bundled"', release="manta")
    names = {doc["metadata"]["name"] for doc in docs}
    claims = {f"data-{doc['metadata']['name']}-0" for doc in of_kind(docs, "StatefulSet")}
    pods_ = {f"{doc['metadata']['name']}-0" for doc in of_kind(docs, "StatefulSet")}
    backed_up = set(re.findall(r"\b(?:data-)?manta-(?:home|tokens|postgres|redis)(?:-0)?\b", readme))
    assert {"manta-home", "manta-tokens", "manta-postgres", "data-manta-redis-0"} <= backed_up <= names | claims | pods_
    assert (
        "originated-from-cr-name=manta`" in readme.replace("\n", "")
        and one(docs, "RayService")["metadata"]["name"] == "manta"
    )


def test_prometheus_scrapes_the_front_end_with_a_viewers_token() -> None:
    """The token stands in the secret, in the pod that adopts it, and in the ServiceMonitor; the head alone is asked."""
    docs = render("high-availability")
    (endpoint,) = one(docs, "ServiceMonitor", "-frontend")["spec"]["endpoints"]
    assert (endpoint["path"], endpoint["authorization"]["type"]) == ("/metrics", "Bearer")
    assert RULES["GET /metrics"].least == "viewer"
    credentials = endpoint["authorization"]["credentials"]
    assert credentials["key"] in one(docs, "Secret", credentials["name"])["data"]
    service = one(docs, "Service", "-frontend-metrics")
    assert service["spec"]["ports"] == [{"name": endpoint["port"], "port": 8000}]
    wanted = one(docs, "ServiceMonitor", "-frontend")["spec"]["selector"]["matchLabels"]
    assert wanted.items() <= service["metadata"]["labels"].items()
    assert [pod.role for pod in pods(docs) if service["spec"]["selector"].items() <= pod.labels.items()] == ["head"]
    config = yaml.safe_load(one(docs, "RayService")["spec"]["serveConfigV2"])
    file = config["applications"][0]["runtime_env"]["env_vars"]["MANTA_METRICS_TOKEN_FILE"]
    (head,) = [pod for pod in pods(docs) if pod.labels.get("manta-head") == "service"]
    (volume,) = [volume for volume in head.spec["volumes"] if volume["name"] == "admin-token"]
    paths = {f"/etc/manta/{item['path']}" for item in volume["secret"]["items"] if item["key"] == credentials["key"]}
    assert paths == {file}


def test_without_prometheus_there_is_no_scraper() -> None:
    docs = render("minimal")
    assert not of_kind(docs, "ServiceMonitor") and "METRICS_TOKEN" not in str(docs)
    assert "'path': 'metrics_token'" not in str(docs)  # an existing secret need not have one


def test_rules_are_of_the_release_alone() -> None:
    (group,) = one(render("high-availability"), "PrometheusRule")["spec"]["groups"]
    for rule in group["rules"]:
        assert f'namespace="{NAMESPACE}"' in rule["expr"] and "=~" not in rule["expr"].split("namespace")[1][:3]
    assert any("{{ $labels.job_id }}" in rule["annotations"]["summary"] for rule in group["rules"])


def test_traces_are_sent_where_a_collector_is_named() -> None:
    def variables(docs: list[Any]) -> list[dict[str, Any]]:
        found = [v for pod in pods(docs) for c in pod.spec["containers"] for v in c.get("env", [])]
        return [variable for variable in found if variable["name"].startswith("OTEL_")]

    assert variables(render("minimal")) == []
    tracing = {
        "endpoint": "http://collector.observability:4318",
        "headersSecret": "collector",
        "variables": {"OTEL_TRACES_SAMPLER": "parentbased_always_on"},
    }
    docs = render("gpu-spot", f"tracing={json.dumps(tracing)}")
    nodes = [pod for pod in pods(docs) if pod.role in ("head", "worker")]
    names = ["ENDPOINT", "HEADERS"]
    assert len(variables(docs)) == 4 * len(nodes) and len(nodes) > 3
    assert {v["name"] for v in variables(docs)} >= {f"OTEL_EXPORTER_OTLP_{name}" for name in names}
