"""What Ray is asked for: room of a cluster that can grow, and where a driver runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.fitting import misfit
from service.packing import Node, may_come
from service.ray_jobs import GIB, HEAD, RayJobs, drivers_on
from service.settings import NodeGroup, Settings
from service.usage import Quota
from tests.service.world import BODY
from tests.toy import TOY_MAE
from workloads.spec import JobSpec


class FakeClient:
    """Ray's JobSubmissionClient, as far as it is used."""

    def __init__(self) -> None:
        self.submitted: list[dict[str, Any]] = []

    def list_jobs(self) -> list[Any]:
        return [
            SimpleNamespace(submission_id=one["submission_id"], status=SimpleNamespace(value="PENDING"))
            for one in self.submitted
        ]

    def submit_job(self, **job: Any) -> None:
        self.submitted.append(job)


def submitted(home: Path, resources: dict[str, Any], **settings: Any) -> dict[str, Any]:
    spec = JobSpec.model_validate(
        {
            "name": "toy",
            "method": TOY_MAE,
            "model": {"name": "vit", "image_size": 16, "patch_size": 8, "dim": 8, "depth": 1, "heads": 1},
            "data": {"train": {"shards": "/data/train.tar"}},
            "steps": 1,
            "batch_size": 8,
            "resources": resources,
        }
    )
    (home / "runs" / "job-1").mkdir(parents=True)
    (home / "runs" / "job-1" / "job.json").write_text(spec.model_dump_json())
    ray, client = RayJobs(Settings(home=home, **settings)), FakeClient()
    ray._client = client
    ray.submit("job-1", 1)
    ray.submit("job-1", 1)
    (one,) = client.submitted  # asked twice, started once
    return one


@pytest.mark.parametrize(
    ("resources", "cpus"),
    [
        ({"workers": 1, "cpus_per_worker": 3}, 3),  # trains in the driver, which reserves its cores on a worker node
        ({"workers": 2}, None),  # Ray Train reserves
        ({"workers": [1, 4]}, None),
        ({"workers": 1, "gpus_per_worker": 1}, None),
    ],
)
def test_on_a_cluster_that_grows_a_driver_that_trains_reserves_its_cores(
    tmp_path: Path, resources: dict[str, Any], cpus: int | None
) -> None:
    groups = (NodeGroup(count=4, resources={"CPU": 16}),)
    assert submitted(tmp_path, resources, cluster_nodes=groups).get("entrypoint_num_cpus") == cpus


def test_elsewhere_drivers_run_on_the_head(tmp_path: Path) -> None:
    assert submitted(tmp_path, {"workers": 1}).get("entrypoint_num_cpus") is None


@pytest.mark.parametrize(
    ("resources", "custom"),
    [
        ({"workers": 1}, {"rack": 0.5}),  # the driver trains, so it goes where the resource is
        ({"workers": 2}, None),
    ],
)
def test_a_driver_that_trains_takes_the_custom_resources(
    tmp_path: Path, resources: dict[str, Any], custom: dict[str, float] | None
) -> None:
    asked = resources | {"custom_per_worker": {"rack": 0.5}}
    assert submitted(tmp_path, asked).get("entrypoint_resources") == custom


def test_what_there_is_and_what_the_cluster_may_grow_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes: list[dict[str, Any]] = [
        {"NodeID": name, "Alive": name != "gone", "Resources": {"CPU": 4.0, "memory": 8.0 * GIB}}
        for name in ("new", "gone", "head")
    ]
    nodes[2]["Resources"][HEAD] = 1.0
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    free = {"head": {"CPU": 1.0, "memory": 8.0 * GIB, HEAD: 1.0}}
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: free)
    found = RayJobs(Settings(home=tmp_path)).hardware()
    assert [node.total["CPU"] for node in found.nodes] == [4.0, 4.0] and HEAD in found.nodes[0].total
    assert [node.used.get("CPU") for node in found.nodes] == [3.0, None]
    assert (found.drivers, found.grows) == (10, False)
    sizes = {"CPU": 8.0, "GPU": 8.0, "h100": 8.0}, {"CPU": 4.0}
    groups = tuple(NodeGroup(count=2, resources=size) for size in sizes)
    found = RayJobs(Settings(home=tmp_path, cluster_nodes=groups, max_running_jobs=3)).hardware()
    assert [node.total["CPU"] for node in found.nodes] == [4.0, 4.0, 8.0, 8.0, 4.0]  # one of the second is there
    assert found.nodes[2] == Node(sizes[0])
    assert [node.used.get("CPU") for node in found.nodes[:2]] == [3.0, None]
    assert (found.drivers, found.grows) == (3, True)


LARGE, SMALL, OTHER = {"CPU": 96.0, "GPU": 8.0}, {"CPU": 8.0}, {"CPU": 8.0, "GPU": 1.0}


@pytest.mark.parametrize(
    ("groups", "there", "more"),
    [
        ([(1, LARGE)], [LARGE], []),
        ([(2, LARGE)], [LARGE | {"GPU": 7.0, "memory": 9.0}], [LARGE]),  # one of its GPUs is broken
        ([(1, LARGE), (1, OTHER)], [LARGE | {"GPU": 1.0}], [OTHER]),
        ([(1, LARGE), (1, OTHER)], [LARGE | {"GPU": 7.0}, LARGE], []),  # the group of its size has no room left
        ([(1, LARGE)], [LARGE, LARGE], []),  # while a node is replaced by another
        ([(1, LARGE), (1, SMALL)], [{"CPU": 4.0}] * 2, [LARGE]),  # no node without a GPU is one of the first
        ([(1, LARGE)], [LARGE | {"GPU": 0.0}], [LARGE]),
        ([(1, SMALL), (1, SMALL)], [], [SMALL, SMALL]),  # on demand, and spot
        ([(1, SMALL), (1, SMALL)], [SMALL], [SMALL]),
        ([(1, SMALL), (1, SMALL)], [SMALL, SMALL], []),
    ],
)
def test_which_nodes_may_come(groups: list[Any], there: list[dict[str, float]], more: list[dict[str, float]]) -> None:
    found = may_come([NodeGroup(count=n, resources=size) for n, size in groups], [Node(size) for size in there])
    assert [node.total for node in found] == more


def test_the_settings_of_before_are_not_ignored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MANTA_CLUSTER_GPUS", "64")
    monkeypatch.setenv("MANTA_DATABASE_URL", "postgresql://manta:canary@db")
    with pytest.raises(ValueError, match=r"got MANTA_CLUSTER_GPUS, .*expected MANTA_CLUSTER_NODES; set it to") as error:
        Settings(home=tmp_path)
    assert "canary" not in str(error.value)


def test_a_worker_larger_than_any_node_that_may_come_is_none_that_waits(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("ray.nodes", lambda: [{"NodeID": "head", "Alive": True, "Resources": {HEAD: 1.0}}])
    monkeypatch.setattr("ray._private.state.available_resources_per_node", lambda: {})
    groups = NodeGroup(count=4, resources={"CPU": 96, "GPU": 8}), NodeGroup(count=2, resources={"CPU": 8, "GPU": 0})
    nodes = [node.total for node in RayJobs(Settings(home=tmp_path, cluster_nodes=groups)).hardware().nodes]
    spec = JobSpec.model_validate(BODY | {"batch_size": 64, "resources": {"gpus_per_worker": 16}})
    problem = misfit(spec, nodes, "a", Quota())
    assert problem is not None
    assert problem.message == "got workers of 1 CPU and 16 GPU, expected at most the 96 CPU and 8 GPU of a node"
    assert problem.hint == "resources.gpus_per_worker: 8 fits"
    fits = spec.resources.model_copy(update={"gpus_per_worker": 8.0, "workers": 4})
    assert misfit(spec.model_copy(update={"resources": fits}), nodes, "a", Quota()) is None


@pytest.mark.parametrize(("gib", "drivers"), [(0.1, 1), (4, 5), (8, 10), (48, 97)])
def test_how_many_drivers_the_memory_of_the_head_holds(gib: float, drivers: int) -> None:
    assert drivers_on({HEAD: 1.0, "memory": gib * GIB}) == drivers
    assert drivers_on({"memory": gib * GIB}) is drivers_on({HEAD: 1.0}) is None
