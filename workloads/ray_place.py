"""The workers of a cluster as the place where a job's work is done; ray must be connected for `scan`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from workloads.metrics import OnPoint
from workloads.online import Start
from workloads.place import Here, device
from workloads.ray_notice import notice
from workloads.ray_online import ClusterTask
from workloads.ray_train import train_on_ray
from workloads.record import RunFolder
from workloads.spec import BaseSpec, JobSpec
from workloads.spec_training import Resources

T = TypeVar("T")


def needs_a_group(spec: BaseSpec) -> bool:
    """Whether Ray Train makes a group of workers for it; one CPU worker is the process itself."""
    return spec.resources.max_workers > 1 or spec.resources.gpus > 0


class Workers:
    """Workers of Ray."""

    def __init__(
        self, spec: BaseSpec, run: RunFolder, home: Path, should_stop: Callable[[], bool], connected: Callable[[], None]
    ) -> None:
        """Starts nothing.

        Args:
            spec: of the job.
            run: its folder; the file `stop` in it stops what is trained.
            home: where references to weights are looked up.
            should_stop: polled by what is trained in this process.
            connected: called after `ray.init`, which replaces signal handlers.
        """
        self._resources, self._run, self._home, self._connected = spec.resources, run, home, connected
        self._here = Here(spec.resources, home, should_stop, notice)

    @property
    def online(self) -> Start:
        return ClusterTask

    def train(self, spec: JobSpec, run: RunFolder, on_point: OnPoint = lambda _: None) -> bool:
        if not needs_a_group(spec):
            return self._here.train(spec, run, on_point)
        run.path.mkdir(parents=True, exist_ok=True)
        if run.path != self._run.path and not run.stop.is_symlink():
            run.stop.symlink_to(self._run.stop)  # is there for the workers when the job's own is
        return train_on_ray(spec, run, self._home, connected=self._connected)

    def scan(self, function: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        import ray

        of_one = self._resources
        task = ray.remote(
            num_cpus=of_one.cpus_per_worker,
            num_gpus=of_one.gpus_per_worker,
            resources=of_one.custom_per_worker,
            max_calls=1,
            max_retries=3,
        )(scanned)
        found: T = ray.get(task.remote(function, of_one, model, *arguments))
        return found


def scanned(function: Callable[..., T], resources: Resources, model: nn.Module, *arguments: Any) -> T:
    """What the task calls."""
    return function(model.to(device(resources)), *arguments)
