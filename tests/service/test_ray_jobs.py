"""What Ray is asked for: room of a cluster that can grow, and where a driver runs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.ray_jobs import RayJobs
from service.settings import Settings
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
    assert submitted(tmp_path, resources, cluster_cpus=64).get("entrypoint_num_cpus") == cpus


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


def test_capacity_is_what_the_cluster_may_grow_to(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    nodes = [{"Alive": alive, "Resources": {"CPU": 4.0, "memory": 1.0}} for alive in (True, False, True)]
    monkeypatch.setattr("ray.nodes", lambda: nodes)
    assert RayJobs(Settings(home=tmp_path)).nodes() == [{"CPU": 4.0, "memory": 1.0}] * 2
    assert RayJobs(Settings(home=tmp_path)).capacity() == {"CPU": 8.0, "memory": 2.0}
    grows = Settings(home=tmp_path, cluster_cpus=4, cluster_gpus=16, cluster_custom={"h100": 16})
    never_less = {"CPU": 8.0, "GPU": 16.0, "h100": 16.0, "memory": 2.0}
    assert RayJobs(grows).nodes() == [never_less]
