"""What the values make of the pods: sizes, GPUs, variables, volumes, images."""

from __future__ import annotations

import json
from typing import Any

import pytest

from service.settings import Settings
from tests.helm.chart import CASES, PodOf, one, pods, render, whole


def test_rays_autoscaler_sees_the_custom_resources_of_a_group() -> None:
    from ray.autoscaler._private.kuberay import autoscaling_config

    groups = one(render("gpu-spot"), "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    seen = [autoscaling_config._get_ray_resources_from_group_spec(group, is_head=False) for group in groups]
    assert [one.get("h100", 0) for one in seen] == [0, 8, 0]
    assert (seen[1]["CPU"], seen[1]["GPU"]) == (96, 8)


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


def ray_nodes(case: str, *sets: str) -> list[PodOf]:
    return [pod for pod in pods(render(case, *sets)) if pod.role in ("head", "worker")]


def given(pod: PodOf, prefix: str) -> dict[str, Any]:
    return {v["name"]: v.get("value") for v in pod.spec["containers"][0]["env"] if v["name"].startswith(prefix)}


def has_gpus(pod: PodOf) -> bool:
    return any("/" in name for name in pod.spec["containers"][0]["resources"]["limits"])


@pytest.mark.parametrize("case", CASES)
def test_pods_without_gpus_see_none(case: str) -> None:
    """The image asks its runtime for all of the node's; a device plugin says which ones the others get."""
    for pod in ray_nodes(case):
        assert given(pod, "NVIDIA_VISIBLE") == ({} if has_gpus(pod) else {"NVIDIA_VISIBLE_DEVICES": "void"}), pod.where


@pytest.mark.parametrize("case", CASES)
def test_groups_without_gpus_tell_ray_so(case: str) -> None:
    """By `resources` as custom ones: KubeRay refuses a group that has any there and others in rayStartParams."""
    from ray.autoscaler._private.kuberay import autoscaling_config

    for doc in [doc for doc in whole(render(case)) if doc["kind"] in ("RayService", "RayJob")]:
        cluster = doc["spec"].get("rayClusterConfig") or doc["spec"]["rayClusterSpec"]
        assert cluster["headGroupSpec"]["rayStartParams"]["num-gpus"] == "0"
        for group in cluster["workerGroupSpecs"]:
            seen = autoscaling_config._get_ray_resources_from_group_spec(group, is_head=False)
            limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
            assert seen["GPU"] == limits.get("nvidia.com/gpu", 0)
            assert not set(group["rayStartParams"]) & {"num-cpus", "num-gpus", "memory", "resources"}


def test_a_group_without_gpus_gives_out_custom_resources_too() -> None:
    group = {"name": "a", "minReplicas": 0, "maxReplicas": 1, "cpus": 1, "memory": "1Gi", "custom": {"fast": 2}}
    docs = render("minimal", f"workers={json.dumps([group])}")
    (spec,) = one(docs, "RayService")["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert spec["resources"] == {"GPU": "0", "fast": "2"}


def test_nodes_of_ray_know_the_object_store() -> None:
    store = {"existingSecret": "keys", "endpoint": "https://minio.example.org", "region": "eu-1"}
    nodes = ray_nodes("minimal", f"storage.objectStore={json.dumps(store)}")
    assert len(nodes) == 4  # head and group, of the service and of a job
    for pod in nodes:
        assert given(pod, "AWS_") == {"AWS_ENDPOINT_URL": store["endpoint"], "AWS_REGION": "eu-1"}
        assert pod.spec["containers"][0]["envFrom"] == [{"secretRef": {"name": "keys"}}]
    for pod in ray_nodes("minimal"):
        assert given(pod, "AWS_") == {} and "envFrom" not in pod.spec["containers"][0]


def test_shards_are_mounted_read_only_on_every_node_of_ray() -> None:
    for pod in ray_nodes("gpu-spot"):
        mounts = {mount["mountPath"]: mount for mount in pod.spec["containers"][0]["volumeMounts"]}
        mount = mounts["/data/imagenet"]
        (volume,) = [volume for volume in pod.spec["volumes"] if volume["name"] == mount["name"]]
        assert mount["readOnly"] is True
        assert volume["persistentVolumeClaim"] == {"claimName": "imagenet", "readOnly": True}
        assert "readOnly" not in mounts["/var/lib/manta"]


@pytest.mark.parametrize(
    ("case", "head", "volumes"),
    [("minimal", "service", ["tmp", "ray-logs"]), ("minimal", "job", ["tmp"]), ("air-gapped", "service", ["tmp"])],
)
def test_the_size_of_scratch_bounds_what_ray_writes(case: str, head: str, volumes: list[str]) -> None:
    """Beside an autoscaler, KubeRay mounts a volume ray-logs at /tmp/ray: the one of the template, where it has one."""
    (pod,) = [pod for pod in ray_nodes(case, 'head.scratch="7Gi"') if pod.labels.get("manta-head") == head]
    sizes = {volume["name"]: volume["emptyDir"]["sizeLimit"] for volume in pod.spec["volumes"] if "emptyDir" in volume}
    assert sizes == dict.fromkeys(volumes, "7Gi")
