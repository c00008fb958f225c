"""What must hold of everything the chart renders: each function takes the objects and says what breaks the rule."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Iterator

from tests.helm.chart import Doc, PodOf, of_kind, pods, whole
from tests.helm.network import selects
from tests.helm.services import answered, behind, by_kuberay, used

FRONT_END, METRICS, OPERATOR_PORTS = 8000, 8080, {8000, 8265, 52365}
SECRET_NAME = re.compile(r"(TOKEN|PASSWORD|SECRET|DATABASE_URL|_AUTH$)")
NOT_SECRETS = {"MANTA_TOKENS", "MANTA_FIRST_ADMIN_TOKEN_FILE", "POSTGRES_PASSWORD_FILE"}  # a mode, and paths of files
LABEL, SUBDOMAIN = r"[a-z]([-a-z0-9]*[a-z0-9])?", r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?"  # RFC 1035, RFC 1123
LABELS = {"Service", "RayService", "RayJob", "StatefulSet", "Pod"}  # also in host names: neither dots nor a first digit
FORBIDDEN_IN_A_POD = ("hostNetwork", "hostPID", "hostIPC", "shareProcessNamespace")


def containers(pod: PodOf) -> list[Doc]:
    return [*pod.spec["containers"], *pod.spec.get("initContainers", [])]


def confined(docs: list[Doc]) -> Iterator[str]:
    """No root, no privilege, nothing of the host, nothing writable but volumes."""
    for pod in pods(docs):
        context = pod.spec.get("securityContext", {})
        if context.get("runAsNonRoot") is not True or not context.get("runAsUser"):
            yield f"{pod.where} may run as root"
        if context.get("seccompProfile") != {"type": "RuntimeDefault"}:
            yield f"{pod.where} has no seccomp profile"
        yield from (f"{pod.where} has {name}" for name in FORBIDDEN_IN_A_POD if pod.spec.get(name))
        yield from (f"{pod.where} mounts a path of the host" for v in pod.spec.get("volumes", []) if "hostPath" in v)
        for container in [*containers(pod), *_autoscalers(docs)]:
            own = container.get("securityContext", {})
            if own.get("allowPrivilegeEscalation") is not False or own.get("capabilities") != {"drop": ["ALL"]}:
                yield f"{pod.where}, {container['name']} keeps privileges"
            if own.get("readOnlyRootFilesystem") is not True:
                yield f"{pod.where}, {container['name']} may write to its root file system"
            if own.get("privileged") or own.get("runAsUser") == 0:
                yield f"{pod.where}, {container['name']} takes privileges"


def _autoscalers(docs: list[Doc]) -> list[Doc]:
    """The container that KubeRay puts beside a head that grows."""
    clusters = [doc["spec"]["rayClusterConfig"] for doc in of_kind(docs, "RayService")]
    return [{"name": "autoscaler"} | c["autoscalerOptions"] for c in clusters if c["enableInTreeAutoscaling"]]


def pinned(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        for container in containers(pod):
            image = container["image"]
            if not re.search(r"(@sha256:[0-9a-f]{64}|:[\w.-]*\d[\w.-]*)$", image) or image.endswith(":latest"):
                yield f"{pod.where}: {image} is not pinned"


# What says that it takes requests: Ray's agent of the node (of a head: the control plane too), or the database itself.
READY = {
    "head": {"path": "/api/healthz", "port": 52365},
    "worker": {"path": "/api/local_raylet_healthz", "port": 52365},
    "postgres": ["pg_isready", "-U", "manta", "-d", "manta"],
    "redis": ["redis-cli", "ping"],
}


def probed(docs: list[Doc]) -> Iterator[str]:
    """What lasts is probed: ready when it takes requests, with five minutes and more to start; liveness asks only for a
    port, over five minutes, so that slow training is never killed."""
    for pod in pods(docs):
        for container in pod.spec["containers"] if pod.lasts else []:
            where = f"{pod.where}, {container['name']}"
            yield from (
                f"{where} has no {kind}" for kind in ("startupProbe", "readinessProbe") if kind not in container
            )
            for kind, least, most in (("startupProbe", 300, 1800), ("readinessProbe", 5, 60)):
                probe = container.get(kind, {})
                if probe and (probe.get("httpGet") or probe.get("exec", {}).get("command")) != READY[pod.role]:
                    yield f"{where} is not asked by its {kind} whether it takes requests"
                if probe and not least <= probe["periodSeconds"] * probe.get("failureThreshold", 3) <= most:
                    yield f"{where}: its {kind} waits too short or too long"
            live = container.get("livenessProbe")
            if live is None:  # KubeRay would put its own there
                yield f"{where} has no livenessProbe"
            elif "tcpSocket" not in live or live["periodSeconds"] * live["failureThreshold"] < 300:
                yield f"{where} may be killed while it is only slow"


def graceful(docs: list[Doc]) -> Iterator[str]:
    """A pod has longer to end than Ray waits for checkpoints, and Ray at least as long as a job is given."""
    for pod in pods(docs):
        if pod.role not in ("head", "worker"):
            continue
        env = {e["name"]: e.get("value") for e in pod.spec["containers"][0]["env"]}
        drain = int(env["RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"])
        if pod.spec.get("terminationGracePeriodSeconds", 30) <= drain:
            yield f"{pod.where} is killed before its drain of {drain} s is over"
        if int(env["RAY_JOB_STOP_WAIT_TIME_S"]) > drain:
            yield f"{pod.where} drains shorter than a stopped job may take for its checkpoint"


def bounded(docs: list[Doc]) -> Iterator[str]:
    for pod in pods(docs):
        for container in [*containers(pod), *_autoscalers(docs)]:
            resources = container.get("resources", {})
            for kind in ("requests", "limits"):
                missing = {"cpu", "memory"} - set(resources.get(kind, {}))
                yield from (f"{pod.where}, {container['name']} has no {kind} of {name}" for name in sorted(missing))
        for volume in pod.spec.get("volumes", []):
            if "emptyDir" in volume and not (volume["emptyDir"] or {}).get("sizeLimit"):
                yield f"{pod.where}: the volume {volume['name']} may fill the node"
        grows = pod.labels.get("manta-head") == "service" and _autoscalers(docs)
        if grows and "ray-logs" not in [volume["name"] for volume in pod.spec["volumes"]]:
            yield f"{pod.where}: KubeRay makes the volume ray-logs for the autoscaler, which may fill the node"


def closed(docs: list[Doc]) -> Iterator[str]:
    """Nothing but the front end can be reached from outside the release, by any kind of object."""
    for service in of_kind(docs, "Service"):
        if service["spec"].get("type", "ClusterIP") != "ClusterIP" or service["spec"].get("externalIPs"):
            yield f"Service {service['metadata']['name']} is open to the outside"
    for doc in of_kind(docs, "RayService"):
        if doc["spec"]["rayClusterConfig"]["headGroupSpec"].get("serviceType") != "ClusterIP":
            yield "the head's Service is open to the outside"
    front_end = by_kuberay(docs)[0]["metadata"]["name"]
    if [pod.labels.get("manta-head") for pod, _ in behind(by_kuberay(docs)[0], docs)] != ["service"]:
        yield f"{front_end} leads to others than the head of the service"
    for ingress in of_kind(docs, "Ingress"):
        for rule in ingress["spec"]["rules"]:
            for path in rule["http"]["paths"]:
                if path["backend"]["service"] != {"name": front_end, "port": {"number": FRONT_END}}:
                    yield f"the Ingress leads to {path['backend']['service']}"
    for route in of_kind(docs, "HTTPRoute"):
        for rule in route["spec"]["rules"]:
            for backend in rule["backendRefs"]:
                if backend != {"name": front_end, "port": FRONT_END}:
                    yield f"the HTTPRoute leads to {backend}"
    for pod in pods(docs):
        yield from (
            f"{pod.where} has a port of the host"
            for c in containers(pod)
            for p in c.get("ports", [])
            if "hostPort" in p
        )
        yield from _reachable(pod, of_kind(docs, "NetworkPolicy"))


def _reachable(pod: PodOf, policies: list[Doc]) -> Iterator[str]:
    """Ports of a pod that policies open to others than pods of the release."""
    mine = [p["spec"] for p in policies if selects(p["spec"]["podSelector"], pod.labels)]
    if not any(set(spec["policyTypes"]) == {"Ingress", "Egress"} for spec in mine):
        yield f"{pod.where} is not denied by default"
    for rule in [rule for spec in mine for rule in spec.get("ingress", [])]:
        if not rule.get("from"):
            yield f"{pod.where} may be reached by anybody"
        for peer in rule.get("from", []):
            if set(peer) == {"podSelector"}:  # in this namespace: by the labels of this release
                wanted = peer["podSelector"].get("matchLabels", {})
                if wanted.get("app.kubernetes.io/instance") != pod.labels["app.kubernetes.io/instance"]:
                    yield f"{pod.where} may be reached by other pods of the namespace"
                continue
            operator = "kuberay-operator" in json.dumps(peer)
            ports = {port["port"] for port in rule.get("ports", [])}
            if not ports or not ports <= (OPERATOR_PORTS if operator else {FRONT_END, METRICS}):
                yield f"{pod.where} may be reached from outside at {sorted(ports) or 'every port'}"


def secret(docs: list[Doc]) -> Iterator[str]:
    """Secrets stand in Secrets alone: in no ConfigMap, argument, variable, annotation or URL."""
    values = [base64.b64decode(v).decode() for doc in of_kind(docs, "Secret") for v in doc["data"].values()]
    for doc in whole(docs):
        if doc["kind"] == "Secret":
            continue
        where, text = f"{doc['kind']} {doc['metadata']['name']}", json.dumps(doc)
        yield from (f"{where} holds the value of a Secret" for value in values if value in text)
        if re.search(r"://[^/\s\"]+:[^/\s\"]+@", text):
            yield f"{where} holds a URL with a password"
    for pod in pods(docs):
        for container in containers(pod):
            for variable in container.get("env", []):
                if SECRET_NAME.search(variable["name"]) and variable["name"] not in NOT_SECRETS and "value" in variable:
                    yield f"{pod.where} has {variable['name']} in the clear"


def named(docs: list[Doc]) -> Iterator[str]:
    """Names and labels fit, also with what KubeRay puts behind them."""
    for doc in whole(docs):
        name, kind = doc["metadata"]["name"], doc["kind"]
        limit = 47 if kind in ("RayService", "RayJob") else 63
        if len(name) > limit or not re.fullmatch(LABEL if kind in LABELS else SUBDOMAIN, name):
            yield f"{kind} {name} is no name of at most {limit} characters"
        for label in [*doc["metadata"].get("labels", {}).values()]:
            if len(label) > 63 or not re.fullmatch(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?", label):
                yield f"{kind} {name} has the label {label!r}"
    twice = [(doc["kind"], doc["metadata"]["name"]) for doc in docs]
    yield from (f"{kind} {name} is there twice" for kind, name in set(twice) if twice.count((kind, name)) > 1)


def whole_in_itself(docs: list[Doc], external: frozenset[str] = frozenset()) -> Iterator[str]:
    """What a pod names is there: secrets, claims, accounts, volumes. `external` are names that the values give."""
    there = {(doc["kind"], doc["metadata"]["name"]) for doc in docs}

    def missing(kind: str, name: str | None) -> bool:
        return name is not None and (kind, name) not in there and name not in external

    for pod in pods(docs):
        wanted = [("ServiceAccount", pod.spec.get("serviceAccountName"))]
        for volume in pod.spec.get("volumes", []):
            wanted.append(("Secret", volume.get("secret", {}).get("secretName")))
            sources = volume.get("projected", {}).get("sources", [])
            wanted += [("Secret", source["secret"]["name"]) for source in sources]
            wanted.append(("PersistentVolumeClaim", volume.get("persistentVolumeClaim", {}).get("claimName")))
        for container in containers(pod):
            for variable in container.get("env", []):
                wanted.append(("Secret", variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name")))
            wanted += [("Secret", source.get("secretRef", {}).get("name")) for source in container.get("envFrom", [])]
            volumes = {volume["name"] for volume in pod.spec.get("volumes", [])} | _claimed(docs, pod)
            mounts = {mount["name"] for mount in container.get("volumeMounts", [])}
            yield from (f"{pod.where} mounts {name}, which is no volume" for name in sorted(mounts - volumes))
        yield from (
            f"{pod.where} names {kind} {name}, which is not there" for kind, name in wanted if missing(kind, name)
        )


def _claimed(docs: list[Doc], pod: PodOf) -> set[str]:
    """Volumes that a StatefulSet makes."""
    sets = [doc for doc in of_kind(docs, "StatefulSet") if pod.where.endswith(doc["metadata"]["name"])]
    return {claim["metadata"]["name"] for doc in sets for claim in doc["spec"]["volumeClaimTemplates"]}


def kept(docs: list[Doc]) -> Iterator[str]:
    """What cannot be made again stays when the release is removed."""
    for doc in [*of_kind(docs, "Secret"), *of_kind(docs, "PersistentVolumeClaim")]:
        if doc["metadata"].get("annotations", {}).get("helm.sh/resource-policy") != "keep":
            yield f"{doc['kind']} {doc['metadata']['name']} goes with the release"


def least(docs: list[Doc]) -> Iterator[str]:
    """Only a head that grows has a token of the API server; no role has wildcards, secrets or the whole cluster."""
    for pod in pods(docs):
        if pod.spec.get("automountServiceAccountToken") is not False and pod.role != "head":
            yield f"{pod.where} gets a token of the API server"
    for doc in docs:
        if doc["kind"] in ("ClusterRole", "ClusterRoleBinding"):
            yield f"{doc['kind']} {doc['metadata']['name']} is of the whole cluster"
        for rule in doc.get("rules", []) if doc["kind"] == "Role" else []:
            if "*" in json.dumps(rule) or "secrets" in rule["resources"]:
                yield f"Role {doc['metadata']['name']} allows {rule}"


Property = Callable[[list[Doc]], Iterator[str]]
ALL: dict[str, Property] = {
    function.__name__: function
    for function in (confined, pinned, probed, graceful, bounded, closed, answered, used, secret, named, kept, least)
}
