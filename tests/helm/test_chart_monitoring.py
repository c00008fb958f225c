"""What Prometheus scrapes and by which token, rules, and traces."""

from __future__ import annotations

import json
from typing import Any

import yaml

from service.access import RULES
from tests.helm.chart import NAMESPACE, of_kind, one, pods, render


def test_rules_are_of_this_release() -> None:
    rules = one(render("high-availability"), "PrometheusRule")["spec"]["groups"][0]["rules"]
    assert len(rules) > 4 and all(f'namespace="{NAMESPACE}"' in rule["expr"] for rule in rules)
    assert all(rule["annotations"]["description"] and rule["labels"]["severity"] for rule in rules)


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
    admin, metrics = [source["secret"] for source in volume["projected"]["sources"]]
    assert (admin["items"][0]["key"], "optional" in admin) == ("admin_token", False)
    assert metrics["items"] == [{"key": credentials["key"], "path": file.removeprefix("/etc/manta/")}]
    assert metrics["optional"] is True  # a secret of the site's own need not have it


def test_without_prometheus_there_is_no_scraper() -> None:
    docs = render("minimal")
    assert not of_kind(docs, "ServiceMonitor") and "METRICS_TOKEN" not in str(docs)


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
