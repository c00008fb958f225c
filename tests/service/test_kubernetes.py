"""`manta submit --k8s`: which group, how many pods, and what kubectl is given."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from service import cli, kubernetes
from service.kubernetes import KubernetesError, ray_job
from tests.helm.chart import job_template, one, render
from tests.toy import TOY_MAE
from workloads.spec import JobSpec


def job(**resources: Any) -> JobSpec:
    return JobSpec.model_validate(
        {
            "name": "toy",
            "method": TOY_MAE,
            "model": {"name": "vit", "image_size": 16, "patch_size": 8, "dim": 8, "depth": 1, "heads": 1},
            "data": {"train": {"shards": "/data/train.tar"}},
            "steps": 1,
            "batch_size": 720,
            "resources": resources,
        }
    )


def group(name: str, cpus: int, gpus: int = 0, most: int = 4, **custom: str) -> dict[str, Any]:
    limits = {"cpu": cpus, "memory": "1Gi"} | ({"amd.com/gpu": gpus} if gpus else {})
    pod = {"metadata": {"labels": {}}, "spec": {"containers": [{"resources": {"limits": limits}}]}}
    sizes = {"replicas": 0, "minReplicas": 0, "maxReplicas": most} | ({"resources": custom} if custom else {})
    return {"groupName": name, **sizes, "template": pod}


def template() -> dict[str, Any]:
    """Three groups, as the chart writes them."""
    groups = [group("cpu", 8), group("big", 96, 8), group("small", 16, 1, l4="2")]
    cluster = {"headGroupSpec": {"template": {"metadata": {"labels": {}}}}, "workerGroupSpecs": groups}
    return {"kind": "RayJob", "metadata": {"name": "job"}, "spec": {"rayClusterSpec": cluster}}


def chosen(document: dict[str, Any]) -> tuple[str, int]:
    (only,) = document["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert only["replicas"] == only["minReplicas"] == only["maxReplicas"]  # admitted as a whole, or not at all
    return only["groupName"], only["replicas"]


@pytest.mark.parametrize(
    ("resources", "asked", "expected"),
    [
        ({"workers": 1}, None, ("cpu", 1)),
        ({"workers": 4, "cpus_per_worker": 4}, None, ("cpu", 2)),
        ({"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 8}, None, ("big", 1)),
        ({"workers": 9, "gpus_per_worker": 1}, None, ("big", 2)),
        ({"workers": [2, 4], "gpus_per_worker": 1}, "small", ("small", 4)),
        ({"workers": 16, "gpus_per_worker": 0.5}, None, ("big", 1)),
        ({"workers": 8, "gpus_per_worker": 1, "cpus_per_worker": 24}, None, ("big", 2)),  # the cores are what is short
        ({"workers": 4, "custom_per_worker": {"l4": 1}}, None, ("small", 2)),  # as what it asks for is there alone
    ],
)
def test_a_job_gets_the_pods_that_it_needs(
    resources: dict[str, Any], asked: str | None, expected: tuple[str, int]
) -> None:
    assert chosen(ray_job(template(), job(**resources), "job-1", asked)) == expected


@pytest.mark.parametrize(
    ("resources", "asked", "says"),
    [
        ({"workers": 1, "gpus_per_worker": 16}, None, "16 GPUs"),
        ({"workers": 1, "cpus_per_worker": 9}, "cpu", "cpu: 4 pods of 8 CPUs, 0 GPUs"),
        ({"workers": 5, "gpus_per_worker": 1}, "small", "4 pods"),
        ({"workers": 1}, "tpu", "expected one of the chart's: cpu, big, small"),
        ({"workers": 1, "custom_per_worker": {"h200": 1}}, None, "and 1 h200"),
    ],
)
def test_what_fits_nowhere_is_refused(resources: dict[str, Any], asked: str | None, says: str) -> None:
    with pytest.raises(KubernetesError, match=says):
        ray_job(template(), job(**resources), "job-1", asked)


def test_the_job_travels_under_its_name() -> None:
    document = ray_job(template(), job(workers=2), "job-1")
    assert (document["metadata"]["name"], document["spec"]["jobId"]) == ("job-1", "job-1")
    assert "entrypointNumCpus" not in document["spec"]


def test_a_driver_that_trains_reserves_its_cores() -> None:
    document = ray_job(template(), job(cpus_per_worker=3, custom_per_worker={"l4": 0.5}), "job-1")["spec"]
    assert document["entrypointNumCpus"] == 3 and json.loads(document["entrypointResources"]) == {"l4": 0.5}


def test_a_job_that_an_annotation_does_not_hold_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kubernetes, "MAX_ANNOTATION_BYTES", 10)
    with pytest.raises(KubernetesError, match="submit it by REST"):
        ray_job(template(), job(), "job-1")


def test_an_installation_without_groups_says_so() -> None:
    empty = job_template(render("minimal", "workers=[]"))
    with pytest.raises(KubernetesError, match="none"):
        ray_job(empty, job(), "job-1")


KUBECTL = """#!/usr/bin/env bash
echo "$*" >> {folder}/calls
case $1 in
    get) cat {folder}/configmaps ;;
    create) cat > {folder}/created ;;
esac
exit $(cat {folder}/code)
"""


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A kubectl that notes what it was asked; `configmaps` and `code` say what it answers."""
    (tmp_path / "kubectl").write_text(KUBECTL.format(folder=tmp_path))
    (tmp_path / "kubectl").chmod(0o755)
    (tmp_path / "code").write_text("0")
    offered(tmp_path, 1)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path


def offered(folder: Path, releases: int) -> None:
    labels = {"app.kubernetes.io/instance": "lab"}
    item = {"metadata": {"labels": labels}, "data": {"rayjob.yaml": yaml.safe_dump(template())}}
    (folder / "configmaps").write_text(json.dumps({"items": [item] * releases}))


def submitted(folder: Path, *options: str) -> Any:
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job(workers=2).model_dump(mode="json")))
    return CliRunner().invoke(cli.app, ["submit", str(path), *options])


def test_the_command_creates_the_rayjob(kubectl: Path) -> None:
    done = submitted(kubectl, "--k8s", "--release", "lab", "--group", "small")
    assert done.exit_code == 0, done.output
    created = json.loads((kubectl / "created").read_text())
    assert created["metadata"]["name"] in done.output and chosen(created) == ("small", 1)
    first, second = (kubectl / "calls").read_text().splitlines()
    assert first == f"get configmaps --selector {kubernetes.SELECTOR},app.kubernetes.io/instance=lab --output json"
    assert second == "create --filename -"


def test_json_has_the_id(kubectl: Path) -> None:
    assert json.loads(submitted(kubectl, "--k8s", "--json").output)["id"].startswith("job-")


def test_the_selector_finds_the_charts_configmap() -> None:
    labels = one(render("minimal"), "ConfigMap", "-job")["metadata"]["labels"]
    assert dict(pair.split("=") for pair in kubernetes.SELECTOR.split(",")).items() <= labels.items()


@pytest.mark.parametrize("releases", [0, 2])
def test_another_number_of_releases_is_said(kubectl: Path, releases: int) -> None:
    offered(kubectl, releases)
    done = submitted(kubectl, "--k8s")
    assert done.exit_code == 1 and "--release" in done.output and not (kubectl / "created").exists()


def test_what_kubectl_refuses_is_said(kubectl: Path) -> None:
    (kubectl / "code").write_text("1")
    done = submitted(kubectl, "--k8s")
    assert done.exit_code == 1 and "kubectl get" in done.output


def test_without_kubectl_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    done = submitted(tmp_path, "--k8s")
    assert done.exit_code == 1 and "no kubectl" in done.output


@pytest.mark.parametrize("options", [("--group", "small"), ("--release", "lab"), ("--k8s", "--follow")])
def test_options_that_do_not_go_together(tmp_path: Path, options: tuple[str, ...]) -> None:
    assert submitted(tmp_path, *options).exit_code == 2
