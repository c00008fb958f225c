"""What stands behind a Service, as Kubernetes finds it; also those that KubeRay makes of the RayService."""

from __future__ import annotations

from collections.abc import Iterator

from tests.helm.chart import Doc, PodOf, of_kind, one, pods
from tests.helm.network import selects


def by_kuberay(docs: list[Doc]) -> list[Doc]:
    """`-serve-svc` and `-head-svc`, as BuildServeService and BuildServiceForHeadPod of KubeRay 1.7 make them."""
    ray = one(docs, "RayService")
    name = ray["metadata"]["name"]
    head = ray["spec"]["rayClusterConfig"]["headGroupSpec"]["template"]["spec"]["containers"][0]
    ports = {port["name"]: {"name": port["name"], "port": port["containerPort"]} for port in head["ports"]}
    own = {port["name"]: port for port in ray["spec"].get("serveService", {"spec": {"ports": []}})["spec"]["ports"]}
    here = {"ray.io/cluster": name}

    def service(ends: str, selector: dict[str, str], ports: list[Doc]) -> Doc:
        spec = {"selector": here | selector, "ports": ports}
        return {"kind": "Service", "metadata": {"name": f"{name}-{ends}"}, "spec": spec}

    return [
        service("serve-svc", {"ray.io/serve": "true"}, [own.get("serve", ports["serve"])]),
        service("head-svc", {"ray.io/node-type": "head"}, list(ports.values())),
    ]


def selected(service: Doc, docs: list[Doc]) -> list[PodOf]:
    return [pod for pod in pods(docs) if selects({"matchLabels": service["spec"]["selector"]}, pod.labels)]


def behind(service: Doc, docs: list[Doc]) -> list[tuple[PodOf, int]]:
    """The endpoints: a port by its name has none on a pod without such a port, one by its number has one on each."""
    found = []
    for pod in selected(service, docs):
        named = {port.get("name"): port["containerPort"] for port in listening(pod)}
        for port in service["spec"]["ports"]:
            target = port.get("targetPort", port["port"])
            if target in named or isinstance(target, int):
                found.append((pod, named.get(target, target)))
    return found


def listening(pod: PodOf) -> list[Doc]:
    return [port for container in pod.spec["containers"] for port in container.get("ports", [])]


def answered(docs: list[Doc]) -> Iterator[str]:
    """Something listens behind every Service, on each of its pods."""
    for service in [*of_kind(docs, "Service"), *by_kuberay(docs)]:
        name, ends = service["metadata"]["name"], behind(service, docs)
        if not ends:
            yield f"Service {name} has nothing behind it"
        for pod, number in ends:
            if number not in {port["containerPort"] for port in listening(pod)}:
                yield f"Service {name} leads to {pod.where}, which does not listen at {number}"


def used(docs: list[Doc]) -> Iterator[str]:
    """A budget holds the head of the service; each PriorityClass is one of a pod, and each pod's is there."""
    all_pods = list(pods(docs))
    for budget in of_kind(docs, "PodDisruptionBudget"):
        held = [pod for pod in all_pods if selects(budget["spec"]["selector"], pod.labels)]
        if [pod.labels.get("manta-head") for pod in held] != ["service"]:
            yield f"the budget {budget['metadata']['name']} holds {[pod.where for pod in held]}"
    classes = {doc["metadata"]["name"] for doc in of_kind(docs, "PriorityClass")}
    wanted = {name for pod in all_pods if (name := pod.spec.get("priorityClassName"))}
    yield from (f"no pod has the PriorityClass {name}" for name in sorted(classes - wanted))
    yield from (f"the PriorityClass {name} is not there" for name in sorted(wanted - classes))
    for doc in of_kind(docs, "PriorityClass"):
        if doc["value"] < -10:  # --expendable-pods-priority-cutoff of Cluster Autoscaler
            yield f"no node is made for pods of {doc['metadata']['name']}: {doc['value']} is below -10"
