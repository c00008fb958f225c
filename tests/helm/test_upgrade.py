"""An upgrade keeps secrets and running jobs: what helm makes of a release that is there already."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helm.chart import NAMESPACE, arguments, helm, load, of_kind, one, render, values
from tests.helm.fake_kubernetes import api_server


def upgraded(secrets: list[dict[str, Any]], folder: Path, *sets: str) -> list[dict[str, Any]]:
    """The objects, as helm renders them where the namespace holds these Secrets."""
    with api_server(secrets, NAMESPACE, folder) as kubeconfig:
        return load(helm("template", "--dry-run=server", *arguments("air-gapped", sets), kubeconfig=kubeconfig))


def test_secrets_are_made_once(tmp_path: Path) -> None:
    first = of_kind(render("air-gapped"), "Secret")
    assert {doc["metadata"]["name"].rpartition("-")[2] for doc in first} == {"tokens", "postgres", "redis"}
    assert of_kind(upgraded(first, tmp_path), "Secret") == first
    fresh = of_kind(upgraded([], tmp_path), "Secret")
    keys = [(i, key) for i, doc in enumerate(first) for key in doc["data"]]
    assert all(first[i]["data"][key] != fresh[i]["data"][key] for i, key in keys), "each installation has its own"


def test_a_key_that_a_new_version_adds_is_made_and_the_others_stay(tmp_path: Path) -> None:
    first = of_kind(render("air-gapped"), "Secret")
    old = one(first, "Secret", "-tokens")
    kept = old["data"]["auth_token"]
    del old["data"]["admin_token"]
    new = one(upgraded(first, tmp_path), "Secret", "-tokens")["data"]
    assert new["auth_token"] == kept and len(base64.b64decode(new["admin_token"])) == 64


def test_tokens_are_long_enough_for_the_service() -> None:
    """32 characters at least, by `first_admin_token_file` of service/settings.py."""
    for value in one(render("minimal"), "Secret", "-tokens")["data"].values():
        assert len(base64.b64decode(value)) >= 32


def test_the_url_and_the_password_of_the_database_agree() -> None:
    secret = {
        key: base64.b64decode(v).decode() for key, v in one(render("minimal"), "Secret", "-postgres")["data"].items()
    }
    assert secret["url"] == f"postgresql+psycopg://manta:{secret['password']}@lab-manta-postgres:5432/manta"


def test_the_same_values_change_nothing_that_runs(tmp_path: Path) -> None:
    before = render("air-gapped")
    after = upgraded(of_kind(before, "Secret"), tmp_path)
    assert after == before


def test_settings_of_the_front_end_touch_no_pod() -> None:
    before = one(render("gpu-spot"), "RayService")["spec"]
    changed = one(render("gpu-spot", 'frontend={"allowedRoots":["*"],"settings":{"max_images":8}}'), "RayService")[
        "spec"
    ]
    assert changed["rayClusterConfig"] == before["rayClusterConfig"]
    assert changed["serveConfigV2"] != before["serveConfigV2"]


def pods_of(case: str, *sets: str) -> Any:
    return one(render(case, *sets), "RayService")["spec"]["rayClusterConfig"]


METRICS: dict[str, Any] = {"networkPolicy": {"metricsFrom": [{"namespaceSelector": {}}]}}


@pytest.mark.parametrize(
    "given",
    [
        {"monitoring": {"serviceMonitor": True, "rules": True, "dashboard": True}, **METRICS},
        {"serving": {"cpusPerModel": 2}},
        {"networkPolicy": {"egress": [{"ports": [{"port": 8443}]}]}},
        {"podDisruptionBudget": {"enabled": False}},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_is_not_of_pods_changes_no_pod(given: dict[str, Any]) -> None:
    """With strategy None a change of pods would not arrive, and a Serve config that counts on it would fail."""
    sets = [f"{key}={json.dumps(value)}" for key, value in given.items()]
    assert render("gpu-spot", *sets) != render("gpu-spot")
    assert pods_of("gpu-spot", *sets) == pods_of("gpu-spot")


def test_files_that_the_front_end_is_told_of_are_mounted_before() -> None:
    """The Serve config changes at once, the pods do not: what its variables may name is there from the start."""
    metrics = ("monitoring.serviceMonitor=true", f"networkPolicy={json.dumps(METRICS['networkPolicy'])}")
    told = yaml.safe_load(one(render("minimal", *metrics), "RayService")["spec"]["serveConfigV2"])
    files = [v for v in told["applications"][0]["runtime_env"]["env_vars"].values() if v.startswith("/etc/manta/")]
    (volume,) = [v for v in pods_of("minimal")["headGroupSpec"]["template"]["spec"]["volumes"] if "projected" in v]
    there = {item["path"] for source in volume["projected"]["sources"] for item in source["secret"]["items"]}
    assert len(files) == 2 and {file.removeprefix("/etc/manta/") for file in files} == there


def without_sizes(config: dict[str, Any]) -> dict[str, Any]:
    """What KubeRay compares to tell whether a cluster is another one."""
    for group in config["workerGroupSpecs"]:
        for key in ("replicas", "minReplicas", "maxReplicas"):
            del group[key]
    return config


def test_other_sizes_of_groups_make_no_other_cluster() -> None:
    larger = [group | {"minReplicas": 1, "maxReplicas": 9} for group in values("gpu-spot")["workers"]]
    after = pods_of("gpu-spot", f"workers={json.dumps(larger)}")
    assert after != pods_of("gpu-spot") and without_sizes(after) == without_sizes(pods_of("gpu-spot"))


def test_a_group_at_the_end_leaves_the_others_as_they_are() -> None:
    """So KubeRay adds it to the cluster that runs."""
    new = {"name": "new", "minReplicas": 0, "maxReplicas": 1, "cpus": 1, "memory": "1Gi"}
    more = [*values("gpu-spot")["workers"], new]
    before, after = pods_of("gpu-spot"), pods_of("gpu-spot", f"workers={json.dumps(more)}")
    assert after.pop("workerGroupSpecs")[:-1] == before.pop("workerGroupSpecs") and after == before


def test_by_default_running_jobs_outlive_an_upgrade() -> None:
    assert one(render("minimal"), "RayService")["spec"]["upgradeStrategy"] == {"type": "None"}
    moved = one(render("high-availability"), "RayService")["spec"]
    assert moved["upgradeStrategy"] == {"type": "NewCluster"}
    assert moved["rayClusterDeletionDelaySeconds"] >= 300  # in which jobs write their last checkpoints
