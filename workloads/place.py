"""Where the work of a job is done: in its own process, or on workers of a cluster (`workloads.ray_place`)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from workloads.metrics import OnPoint
from workloads.online import Start
from workloads.online_child import ChildProcess
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import Resources

if TYPE_CHECKING:
    from torch import nn

T = TypeVar("T")

Notice = Callable[[RunFolder], AbstractContextManager[Callable[[], bool]]]
"""Around the training of a run: says within whether the machine is about to be taken away."""


class Place(Protocol):
    """Trains the job and what its evaluations train, and computes for them."""

    @property
    def online(self) -> Start:
        """Starts the evaluation of a checkpoint while it trains."""

    def train(self, spec: JobSpec, run: RunFolder, on_point: OnPoint = ...) -> bool:
        """Trains `spec` in the folder `run`, or goes on with it; False when it was stopped.

        Args:
            spec: the job itself, or one that an evaluation makes.
            run: its folder.
            on_point: gets each point of the curve, where the loop runs in this process.
        """

    def scan(self, function: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        """`function(model, *arguments)` with the model on the job's GPU, if it has one.

        Args:
            function: of a module; computes where the model is, returns what is on the CPU.
            model: may be moved.
            arguments: may be copied.
        """


class Here:
    """The process that runs the job."""

    def __init__(
        self,
        resources: Resources,
        home: Path,
        should_stop: Callable[[], bool],
        notice: Notice = lambda _: nullcontext(lambda: False),
    ) -> None:
        """Starts nothing.

        Args:
            resources: what there is: cores, and whether the GPU is for this process.
            home: where references to weights are looked up.
            should_stop: polled while it trains.
            notice: of what may take this process's machine away.
        """
        self._resources, self._home, self._should_stop, self._notice = resources, home, should_stop, notice

    @property
    def online(self) -> Start:
        return ChildProcess

    def train(self, spec: JobSpec, run: RunFolder, on_point: OnPoint = lambda _: None) -> bool:
        import torch

        from workloads.data.allocator import keep_freed_memory
        from workloads.ranks import Ranks
        from workloads.train import train

        keep_freed_memory()
        torch.set_num_threads(self._resources.cpus)
        ranks = Ranks(device=device(self._resources))
        with self._notice(run) as preempted:
            return train(
                spec, run, self._home, ranks, should_stop=self._should_stop, preempted=preempted, on_point=on_point
            )

    def scan(self, function: Callable[..., T], model: nn.Module, *arguments: Any) -> T:
        return function(model.to(device(self._resources)), *arguments)


def device(resources: Resources) -> Any:
    """The torch device of a process with these resources."""
    import torch

    return torch.device("cuda" if resources.gpus and torch.cuda.is_available() else "cpu")
