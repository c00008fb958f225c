"""What helm prints and what the README says: commands that are true."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.helm.chart import CASES, CHART, NAMESPACE, RELEASE, arguments, helm, load, of_kind, one, render, values
from tests.helm.services import behind, by_kuberay, selected

EXTERNAL = {"bucket-keys", "minio-keys", "manta-database", "manta-redis", "manta-tokens"}


def notes_of(case: str, folder: Path, *sets: str, upgrade: bool = False) -> str:
    """helm prints them only with a cluster at hand, so a copy of the chart has them in a ConfigMap."""
    shutil.copytree(CHART, folder / "manta")
    (folder / "manta" / "templates" / "NOTES.txt").rename(folder / "manta" / "notes.tpl")
    text = '{{ tpl (.Files.Get "notes.tpl") . | quote }}'
    notes = folder / "manta" / "templates" / "notes.yaml"
    notes.write_text(f"kind: ConfigMap\nmetadata: {{name: notes}}\ndata:\n  notes: {text}\n")
    release, _, *more = arguments(case, sets)
    more += ["--is-upgrade"] * upgrade
    (rendered,) = load(helm("template", release, folder / "manta", *more, "--show-only", "templates/notes.yaml"))
    found: str = rendered["data"]["notes"]
    return found


@pytest.mark.parametrize("case", CASES)
def test_the_commands_of_the_notes_name_what_is_there(case: str, tmp_path: Path) -> None:
    notes = notes_of(case, tmp_path)
    docs = render(case)
    there = {(doc["kind"].lower(), doc["metadata"]["name"]) for doc in [*docs, *by_kuberay(docs)]}
    named = set(re.findall(r"\b(rayservice|service|secret)/([a-z0-9-]+)", notes))
    assert named and named <= there | {("secret", name) for name in EXTERNAL}
    assert f"helm --namespace {NAMESPACE} test {RELEASE}" in notes
    assert ("port-forward" in notes) == (case not in ("high-availability", "external-services"))
    host = values(case)["ingress"]["host"] or values(case)["gateway"]["host"]
    assert f"MANTA_URL={f'https://{host}' if host else 'http://127.0.0.1:8000'}\n" in notes
    assert "MANTA_TOKEN" in (CHART.parents[1] / "service" / "terminal.py").read_text()  # the command line takes it
    assert ("no data yet" in notes) == (not values(case)["frontend"]["allowedRoots"])


def test_the_notes_forward_to_a_service_of_the_head_alone(tmp_path: Path) -> None:
    """kubectl takes any pod that the Service selects, ready or not, whatever the port."""
    docs = render("minimal")
    (name,) = re.findall(r"port-forward service/(\S+) 8000:8000", notes_of("minimal", tmp_path))
    (service,) = [service for service in by_kuberay(docs) if service["metadata"]["name"] == name]
    assert [pod.labels.get("manta-head") for pod in selected(service, docs)] == ["service"]
    assert 8000 in {number for _, number in behind(service, docs)}


@pytest.mark.parametrize("case", CASES)
def test_helm_test_asks_the_front_end(case: str) -> None:
    docs = render(case)
    (url,) = [word for word in one(docs, "Pod")["spec"]["containers"][0]["command"] if "://" in word]
    front_end = by_kuberay(docs)[0]
    assert url == f"http://{front_end['metadata']['name']}:{front_end['spec']['ports'][0]['port']}/readyz"


def test_an_upgrade_tells_how_to_give_a_running_cluster_its_new_sizes(tmp_path: Path) -> None:
    """KubeRay does not pass them on; the front end counts on them."""
    before = one(render("gpu-spot"), "RayService")["spec"]["rayClusterConfig"]
    larger = [group | {"minReplicas": 1, "maxReplicas": 9} for group in values("gpu-spot")["workers"]]
    sets = f"workers={json.dumps(larger)}"
    assert "patch" not in notes_of("gpu-spot", tmp_path / "first", sets)
    notes = notes_of("gpu-spot", tmp_path / "then", sets, upgrade=True)
    (patch,) = re.findall(r"--patch '(.*)'$", notes, re.MULTILINE)
    for step in json.loads(patch):
        _, _, _, index, field = step["path"].split("/")
        group = before["workerGroupSpecs"][int(index)]
        assert field in group and (step["op"] == "replace" or group[field] == step["value"])
        group[field] = step["value"]
    config = one(render("gpu-spot", sets), "RayService")["spec"]["rayClusterConfig"]
    assert [group | {"replicas": 1} for group in before["workerGroupSpecs"]] == config["workerGroupSpecs"]


def test_the_names_in_the_readme_are_those_of_its_release() -> None:
    readme = (CHART / "README.md").read_text()
    docs = render("minimal", 'gcs.faultTolerance="bundled"', release="manta")
    names = {doc["metadata"]["name"] for doc in docs}
    claims = {f"data-{doc['metadata']['name']}-0" for doc in of_kind(docs, "StatefulSet")}
    pods_ = {f"{doc['metadata']['name']}-0" for doc in of_kind(docs, "StatefulSet")}
    backed_up = set(re.findall(r"\b(?:data-)?manta-(?:home|tokens|postgres|redis)(?:-0)?\b", readme))
    assert {"manta-home", "manta-tokens", "manta-postgres", "data-manta-redis-0"} <= backed_up <= names | claims | pods_
    assert (
        "originated-from-cr-name=manta`" in readme.replace("\n", "")
        and one(docs, "RayService")["metadata"]["name"] == "manta"
    )
