"""`manta submit --k8s`: a job as a RayJob of KubeRay, with a cluster of its own that is there as long as the job.

The chart keeps a template of it in a ConfigMap; kubectl brings it and takes the RayJob, by the rights of who calls it.
The run folder is that of the installation: the service adopts the job when it runs, and registers what it leaves.
"""

from __future__ import annotations

import json
import math
import subprocess
import uuid
from collections.abc import Sequence
from typing import Any

import yaml

from workloads.spec_any import AnySpec

SELECTOR = "app.kubernetes.io/name=manta,app.kubernetes.io/component=job-template"
ANNOTATION = "manta-job"  # of every pod of the job's cluster, each of which sees it as /etc/manta/job.json
MAX_ANNOTATION_BYTES = 200_000  # Kubernetes takes 262,144 for all of an object


class KubernetesError(RuntimeError):
    """kubectl, the template or its groups do not allow it: what was got, expected, and what to do."""


def submit(spec: AnySpec, *, release: str | None = None, group: str | None = None) -> str:
    """Creates the RayJob in kubectl's namespace and returns its name, which is the id of the job.

    Args:
        spec: the job; its paths are those that the pods see.
        release: of the chart, where the namespace has more than one.
        group: worker group by its name in the values; default: the first that is large enough.

    Raises:
        KubernetesError: nothing was created.
    """
    selector = SELECTOR + (f",app.kubernetes.io/instance={release}" if release else "")
    found = json.loads(_kubectl("get", "configmaps", "--selector", selector, "--output", "json"))["items"]
    if len(found) != 1:
        names = ", ".join(item["metadata"]["labels"]["app.kubernetes.io/instance"] for item in found) or "none"
        raise KubernetesError(
            f"got {len(found)} releases of Manta in this namespace ({names}), expected one; use --release"
        )
    job_id = f"job-{uuid.uuid4().hex[:12]}"
    document = ray_job(yaml.safe_load(found[0]["data"]["rayjob.yaml"]), spec, job_id, group)
    _kubectl("create", "--filename", "-", given=json.dumps(document))
    return job_id


def ray_job(template: dict[str, Any], spec: AnySpec, job_id: str, group: str | None = None) -> dict[str, Any]:
    """The RayJob of a job: the template with this job in it, and one worker group of the size that the job needs.

    Args:
        template: a RayJob with all worker groups; is changed.
        spec: the job; an elastic one gets all the workers that it may have.
        job_id: its name.
        group: the worker group; default: the first that is large enough.

    Raises:
        KubernetesError: no group fits.
    """
    job = template["spec"]
    chosen, pods = _group(job["rayClusterSpec"]["workerGroupSpecs"], spec, group)
    job["rayClusterSpec"]["workerGroupSpecs"] = [chosen | {"replicas": pods, "minReplicas": pods, "maxReplicas": pods}]
    text = spec.model_dump_json()
    if len(text) > MAX_ANNOTATION_BYTES:
        raise KubernetesError(
            f"got a job of {len(text)} bytes, expected at most {MAX_ANNOTATION_BYTES}; submit it by REST"
        )
    for group_ in (job["rayClusterSpec"]["headGroupSpec"], chosen):  # Ray may start the driver on either
        metadata = group_["template"]["metadata"]
        metadata["annotations"] = metadata.get("annotations", {}) | {ANNOTATION: text}
    resources = spec.resources
    if resources.max_workers == 1 and not resources.gpus:
        job["entrypointNumCpus"] = (
            resources.cpus
        )  # trains in its driver: in the worker pod, as the head gives out no CPU
        if resources.custom:
            job["entrypointResources"] = json.dumps(resources.custom)
    job["jobId"] = template["metadata"]["name"] = job_id
    return template


def _group(groups: Sequence[dict[str, Any]], spec: AnySpec, name: str | None) -> tuple[dict[str, Any], int]:
    """The group that the job runs on, and its number of pods."""
    asked = [group for group in groups if name in (None, group["groupName"])]
    if not asked:
        names = ", ".join(group["groupName"] for group in groups) or "none"
        raise KubernetesError(f"got --group {name}, expected one of the chart's: {names}")
    workers = spec.resources.max_workers
    for group in asked:
        each = _workers_in(group, spec)
        if each:
            pods = math.ceil(workers / each)
            if pods <= group["maxReplicas"]:
                return group, pods
    sizes = "; ".join(
        "{groupName}: {maxReplicas} pods of {cpus} CPUs, {gpus} GPUs".format(**g, **_size(g)) for g in asked
    )
    needed = f"{workers} workers of {spec.resources.cpus_per_worker} CPUs and {spec.resources.gpus_per_worker:g} GPUs"
    needed += "".join(f" and {amount:g} {name}" for name, amount in spec.resources.custom_per_worker.items())
    raise KubernetesError(
        f"got {needed}, expected what a group has room for ({sizes}); change resources, or the values"
    )


def _workers_in(group: dict[str, Any], spec: AnySpec) -> int:
    """How many workers of the job a pod has room for."""
    size, resources = _size(group), spec.resources
    rooms: list[float] = [size["cpus"] // resources.cpus_per_worker]
    if resources.gpus_per_worker:
        rooms.append(size["gpus"] // resources.gpus_per_worker)
    custom = group.get("resources", {})
    rooms += [float(custom.get(name, 0)) // each for name, each in resources.custom_per_worker.items()]
    return int(min(rooms))


def _size(group: dict[str, Any]) -> dict[str, int]:
    """Of a pod; what is neither CPU, memory nor disk is the GPU, whatever the device plugin calls it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    gpus = [int(value) for key, value in limits.items() if "/" in key]
    return {"cpus": int(limits["cpu"]), "gpus": sum(gpus)}


def _kubectl(*arguments: str, given: str | None = None) -> str:
    try:
        done = subprocess.run(["kubectl", *arguments], input=given, capture_output=True, text=True)
    except FileNotFoundError as error:
        raise KubernetesError("got no kubectl, expected it on the PATH; install it, or submit by REST") from error
    if done.returncode != 0:
        raise KubernetesError(f"kubectl {arguments[0]}: {done.stderr.strip()}")
    return done.stdout
