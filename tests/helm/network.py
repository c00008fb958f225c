"""NetworkPolicies as a network plugin reads them: who may open a connection to whom, and what of that is wrong."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass, field

from tests.helm.chart import NAMESPACE, Doc, PodOf, of_kind, pods

HERE = {"kubernetes.io/metadata.name": NAMESPACE}
ANY_OF_RAY = 10002  # Ray's nodes talk at ports that they choose


@dataclass(frozen=True)
class Peer:
    """One end of a connection: a pod by its labels and those of its namespace, or an address outside of the cluster."""

    where: str
    labels: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, str] = field(default_factory=dict)
    address: str = ""


def of_pod(pod: PodOf) -> Peer:
    return Peer(pod.where, pod.labels, HERE)


def in_namespace(name: str, **labels: str) -> Peer:
    return Peer(f"a pod of {name}", labels, {"kubernetes.io/metadata.name": name})


RESOLVERS = [
    in_namespace("kube-system", **{"k8s-app": "kube-dns"}),
    Peer("NodeLocal DNSCache", address="169.254.20.10"),
    Peer("GKE's resolver", address="169.254.169.254"),
]
OPERATOR = in_namespace("kuberay", **{"app.kubernetes.io/name": "kuberay-operator"})
API_SERVER = Peer("the API server", address="10.0.0.1")
INTERNET = Peer("the internet", address="203.0.113.7")
NEIGHBOUR = in_namespace(NAMESPACE, app="other")
STRANGERS = [NEIGHBOUR, in_namespace("default"), INTERNET]
CLOSED_PORTS = (22, 5432, 6379, 8000, 8080, 8265, ANY_OF_RAY, 52365)


def selects(selector: Doc, labels: dict[str, str]) -> bool:
    assert set(selector) <= {"matchLabels"}, f"{selector} is not understood here"
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())


def may(policies: list[Doc], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Both ends must allow it; an end that no policy of the direction selects allows everything."""
    return _allowed(policies, "egress", "to", source, target, port, protocol) and _allowed(
        policies, "ingress", "from", target, source, port, protocol
    )


def _allowed(policies: list[Doc], direction: str, key: str, own: Peer, other: Peer, port: int, protocol: str) -> bool:
    mine = [
        policy["spec"]
        for policy in policies
        if own.namespace == HERE
        and direction.capitalize() in policy["spec"]["policyTypes"]
        and selects(policy["spec"]["podSelector"], own.labels)
    ]
    return not mine or any(
        (not rule.get(key) or any(_is(peer, other) for peer in rule[key]))
        and (not rule.get("ports") or any(_at(one, port, protocol) for one in rule["ports"]))
        for spec in mine
        for rule in spec.get(direction, [])
    )


def _is(rule: Doc, peer: Peer) -> bool:
    if "ipBlock" in rule:
        block = ipaddress.ip_network(rule["ipBlock"]["cidr"])
        return bool(peer.address) and ipaddress.ip_address(peer.address) in block
    if peer.address:
        return False
    space = rule.get("namespaceSelector", {"matchLabels": HERE})
    return selects(space, peer.namespace) and selects(rule.get("podSelector", {}), peer.labels)


def _at(rule: Doc, port: int, protocol: str) -> bool:
    first: int = rule["port"]
    last: int = rule.get("endPort", first)
    return rule.get("protocol", "TCP") == protocol and first <= port <= last


Way = tuple[Peer, Peer, int, str]  # source, target, port, protocol


def needed(docs: list[Doc], values: Doc) -> Iterator[Way]:
    """Without these it does not work."""
    everyone = list(pods(docs))
    ray = [pod for pod in everyone if pod.role in ("head", "worker", "submitter")]
    tests = [pod for pod in everyone if pod.role == "test"]
    (head,) = [of_pod(pod) for pod in ray if pod.labels.get("manta-head") == "service"]
    for pod in [*ray, *tests]:
        yield from ((of_pod(pod), resolver, 53, kind) for resolver in RESOLVERS for kind in ("UDP", "TCP"))
    yield from ((of_pod(a), of_pod(b), ANY_OF_RAY, "TCP") for a in ray for b in ray)
    for pod in ray:
        if pod.role == "head":
            yield OPERATOR, of_pod(pod), 8265, "TCP"
    yield OPERATOR, head, 8000, "TCP"  # it asks the proxy before it lets requests in
    yield from ((of_pod(pod), head, 8000, "TCP") for pod in tests)
    for pod in everyone:
        if pod.role in ("postgres", "redis"):
            yield head, of_pod(pod), pod.spec["containers"][0]["ports"][0]["containerPort"], "TCP"
    if values["database"]["mode"] == "external":
        yield head, INTERNET, values["database"]["external"]["port"], "TCP"
    if values["gcs"]["faultTolerance"] == "external":
        yield head, INTERNET, values["gcs"]["external"]["port"], "TCP"
    if values["autoscaling"]["enabled"]:
        yield head, API_SERVER, 443, "TCP"
    for peer in _named(values, "frontendFrom"):
        yield peer, head, 8000, "TCP"
    for peer in _named(values, "metricsFrom"):
        yield peer, head, 8000, "TCP"
        yield from ((peer, of_pod(pod), 8080, "TCP") for pod in ray if pod.role != "submitter")


def forbidden(docs: list[Doc], values: Doc) -> Iterator[Way]:
    """These would be holes."""
    ports_in = [(peer, port) for peer in STRANGERS for port in CLOSED_PORTS]
    ports_in += [(OPERATOR, port) for port in CLOSED_PORTS if port not in (8000, 8265, 52365)]
    ports_in += [(peer, port) for peer in _named(values, "frontendFrom") for port in CLOSED_PORTS if port != 8000]
    ports_in += [(p, port) for p in _named(values, "metricsFrom") for port in CLOSED_PORTS if port not in (8000, 8080)]
    for pod in pods(docs):
        me = of_pod(pod)
        yield from ((peer, me, port, "TCP") for peer, port in ports_in)
        yield from ((me, INTERNET, port, kind) for port in (25, 53) for kind in ("TCP", "UDP"))
        yield me, NEIGHBOUR, 9999, "TCP"
        if pod.role in ("postgres", "redis"):
            yield me, INTERNET, 443, "TCP"


def _named(values: Doc, key: str) -> Iterator[Peer]:
    """Pods of the namespaces that the values name."""
    for peer in values["networkPolicy"][key]:
        yield in_namespace(peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"])


def problems(docs: list[Doc], values: Doc) -> Iterator[str]:
    """What cannot be reached and should be, and what can be and should not."""
    policies = of_kind(docs, "NetworkPolicy")
    for source, target, port, protocol in needed(docs, values):
        if not may(policies, source, target, port, protocol):
            yield f"{source.where} cannot reach {target.where} at {protocol} {port}"
    for source, target, port, protocol in forbidden(docs, values):
        if may(policies, source, target, port, protocol):
            yield f"{source.where} reaches {target.where} at {protocol} {port}"
