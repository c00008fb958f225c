"""Evaluations of a job of several workers: what they train and compute is done by workers too."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.embedded import Head
from workloads import ray_place
from workloads.place import Here
from workloads.record import RunFolder
from workloads.run import SUCCEEDED, execute
from workloads.spec import JobSpec


def asked(model: nn.Module, x: torch.Tensor) -> tuple[int, float]:
    """Where, and what."""
    return os.getpid(), model(x).item()


@pytest.mark.ray
def test_what_is_computed_is_computed_by_a_task(cluster: Head, toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = toy_job(resources={"workers": 2})
    workers = ray_place.Workers(spec, RunFolder(tmp_path), tmp_path, lambda: False, connected=lambda: None)

    def nearby(*arguments: Any) -> Any:  # travels by value: workers cannot import a test
        import os

        return os.getpid(), arguments[0](arguments[1]).item()

    process, answer = workers.scan(nearby, nn.Identity(), torch.ones(1))
    assert process != os.getpid() and answer == 1


@pytest.mark.ray
def test_a_job_of_two_workers_is_fine_tuned_by_two(
    cluster: Head, toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    data = {name: {"shards": toy_shards[name]} for name in ("train", "test")}
    full = {"name": "fine_tune", "epochs": 1, "batch_size": 8, "seeds": [0], "untrained": False, "data": data}
    spec = toy_job(resources={"workers": 2}, epochs=None, steps=1, evaluate=[full])
    run = RunFolder(tmp_path / "run")
    assert execute(spec, run, tmp_path, job_id="two", ray=True) == SUCCEEDED
    nested = RunFolder(run.path / "evaluations" / "0-fine_tune" / "pretrained-0")
    assert [event["message"] for event in nested.read_events()][:1] == ["2 workers"]
    (result,) = run.read_evaluations()
    assert 0 <= result["results"]["pretrained"]["mean"] <= 1


def test_a_stop_of_the_job_is_one_of_what_it_trains(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[RunFolder] = []

    def train_on_ray(spec: JobSpec, run: RunFolder, *_: object, **__: object) -> bool:
        seen.append(run)
        return not run.stop.exists()

    monkeypatch.setattr(ray_place, "train_on_ray", train_on_ray)
    job, nested = RunFolder(tmp_path / "job"), RunFolder(tmp_path / "job" / "evaluations" / "0")
    job.path.mkdir()
    spec = toy_job(resources={"workers": 2})
    workers = ray_place.Workers(spec, job, tmp_path, lambda: False, connected=lambda: None)
    assert workers.train(spec, job) and workers.train(spec, nested)
    job.stop.touch()
    assert not workers.train(spec, nested)
    job.stop.unlink()  # the job is resumed
    assert workers.train(spec, nested)
    assert seen == [job, nested, nested, nested]


def test_one_cpu_worker_needs_no_group(
    toy_job: Callable[..., JobSpec], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(ray_place, "train_on_ray")
    two = toy_job(resources={"workers": 2})
    workers = ray_place.Workers(two, RunFolder(tmp_path / "job"), tmp_path, lambda: False, connected=lambda: None)
    nested = RunFolder(tmp_path / "nested")
    assert workers.train(toy_job(epochs=None, steps=1), nested) and nested.metrics.exists()


def test_without_a_cluster_it_is_this_process(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    place = Here(toy_job().resources, tmp_path, lambda: False)
    assert place.scan(asked, nn.Identity(), torch.ones(1)) == (os.getpid(), 1)
