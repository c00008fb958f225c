"""The RayJob of the chart, as `manta submit --k8s` completes it: it has its job wherever it starts, and ends whole."""

from __future__ import annotations

import re
from typing import Any

import pytest

from service import kubernetes
from service.kubernetes import ray_job
from tests.helm import kuberay
from tests.helm.chart import CASES, CHART, job_template, pods, render
from tests.service.test_kubernetes import chosen, job
from workloads.spec import JobSpec


def drivers_groups(rayjob: dict[str, Any]) -> list[dict[str, Any]]:
    """Where Ray may start the entrypoint: on the head, or, where it asks for CPUs, on a node that has them."""
    cluster = rayjob["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    asked = rayjob["spec"].get("entrypointNumCpus", 0)

    def cpus(group: dict[str, Any]) -> float:
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        return float(group["rayStartParams"].get("num-cpus", limits["cpu"]))

    return [group for group in groups if cpus(group) >= asked] if asked else groups[:1]


@pytest.mark.parametrize("resources", [{"workers": 16, "gpus_per_worker": 1}, {"workers": 1}])
def test_kuberay_takes_what_the_charts_template_becomes(resources: dict[str, Any]) -> None:
    assert kuberay.problems(ray_job(job_template(render("kueue")), job(**resources), "job-0123456789ab")) == []


@pytest.mark.parametrize(
    ("resources", "size", "on_workers"),
    [
        ({"workers": 16, "gpus_per_worker": 1}, ("h100", 2), False),
        ({"workers": 2}, ("cpu", 1), False),
        ({"workers": 1}, ("cpu", 1), True),  # trains in its driver
    ],
)
def test_each_node_that_may_run_the_entrypoint_has_its_file(
    resources: dict[str, Any], size: tuple[str, int], on_workers: bool
) -> None:
    spec = job(**resources)
    made = ray_job(job_template(render("kueue")), spec, "job-0123456789ab")
    assert chosen(made) == size
    drivers = drivers_groups(made)
    assert [g.get("groupName") for g in drivers] == [size[0] if on_workers else None]
    for group in drivers:
        metadata, pod = group["template"]["metadata"], group["template"]["spec"]
        (volume,) = [v for v in pod["volumes"] if "downwardAPI" in v]
        (item,) = volume["downwardAPI"]["items"]
        assert item["fieldRef"]["fieldPath"] == f"metadata.annotations['{kubernetes.ANNOTATION}']"
        assert JobSpec.model_validate_json(metadata["annotations"][kubernetes.ANNOTATION]) == spec
        (folder,) = [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == volume["name"]]
        assert made["spec"]["entrypoint"].split()[-1] == f"{folder}/{item['path']}"


@pytest.mark.parametrize("case", CASES)
def test_a_finished_job_gives_its_nodes_back_at_once(case: str) -> None:
    """KubeRay deletes the RayCluster only after this time."""
    spec = job_template(render(case))["spec"]
    assert spec["shutdownAfterJobFinishes"] is True and spec["ttlSecondsAfterFinished"] == 0


def test_the_selectors_of_the_readme_find_what_they_are_for() -> None:
    """The head of the service alone, not those of jobs; and the jobs that `helm uninstall` leaves."""
    readme = (CHART / "README.md").read_text()
    docs = render("minimal", release="manta")

    def matches(command: str, labels: dict[str, str]) -> bool:
        (selector,) = re.findall(rf"{command} --selector (\S+)", readme)
        return dict(pair.split("=") for pair in selector.split(",")).items() <= labels.items()

    assert [pod.where for pod in pods(docs) if matches("get pod", pod.labels)] == ["RayService manta, head"]
    assert matches("delete rayjob", job_template(docs)["metadata"]["labels"])
    assert readme.index("delete rayjob") < readme.index("helm uninstall manta") < readme.index("delete pvc")


def test_a_job_of_its_own_cluster_may_have_a_whole_group_where_that_of_the_service_does_not_grow() -> None:
    docs = render("gpu-spot", "autoscaling.enabled=false", *(f"workers[{i}].minReplicas=1" for i in range(3)))
    made = ray_job(job_template(docs), job(workers=16, gpus_per_worker=1), "job-0123456789ab")
    assert chosen(made) == ("h100", 2)
    (service,) = [doc for doc in docs if doc["kind"] == "RayService"]
    assert {group["maxReplicas"] for group in service["spec"]["rayClusterConfig"]["workerGroupSpecs"]} == {1}
