"""Everything that watches a run: the curve, trackers, guards, warnings, skipped samples, the watchdog.

The loop tells it of each step; it tells the loop nothing but an error that ends the run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch

from workloads.batches import to_device
from workloads.checkpoint import Restored
from workloads.data.modalities import Views
from workloads.data.reader import Reader
from workloads.data.streaming import StreamReader
from workloads.flops import LATER, count, mfu, peak
from workloads.guards import Collapse, CollapseError, Divergence, features_of
from workloads.methods.base import Batch, Method
from workloads.metrics import Curve, MetricsWriter, NonFiniteLossError, OnPoint, SkippedLog, Warnings
from workloads.parallel import Spread
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.step import Done, Stepper
from workloads.trackers import Tracker, trackers_of
from workloads.watchdog import Watchdog


class Monitor:
    """Context manager; one on each rank, of which rank 0 writes what is of all."""

    def __init__(
        self,
        spec: JobSpec,
        run: RunFolder,
        ranks: Ranks,
        readers: Mapping[str, Reader | StreamReader],
        flops: float | None,
        restored: Restored,
        on_point: OnPoint,
    ) -> None:
        """Opens the files of the run.

        Args:
            spec: the job.
            run: its folder.
            ranks: this process among those of the job.
            readers: by stream.
            flops: of a step, over all ranks.
            restored: where the run goes on.
            on_point: gets each point of the curve on rank 0.
        """
        self._spec, self._ranks, self._flops = spec, ranks, flops
        self._peak = None if flops is None else peak(ranks.device, spec.precision)
        first = ranks.rank == 0
        self._trackers: list[Tracker] = []
        self._on_point = on_point
        self._curve = Curve(ranks, MetricsWriter(run.metrics) if first else None, self._tell, spec.batch_size)
        self._skipped = SkippedLog(run.skipped, readers)
        self._warnings = Warnings(run.warnings, readers, [note.text for note in restored.notes]) if first else None
        if first:
            self._skipped.quarantined()
            for note in restored.notes:
                run.event(note.kind, note.text)
            record = run.read_record()
            self._trackers = trackers_of(spec, run, record.job_id if record else run.path.name, restored.step)
        known = (point for point in run.read_metrics() if point["step"] <= restored.step)
        self._divergence = Divergence(spec.guards.divergence, known)
        self._collapse = Collapse(spec.guards.min_feature_std, spec.guards.min_rankme)
        stacks = run.path / f"stacks-rank{ranks.rank}.txt"
        self._watchdog = Watchdog(spec.guards.hang, stacks, rank=ranks.rank, tell=partial(run.event, "hang"))
        self._features: dict[str, float] = {}
        self._collapsed: CollapseError | None = None

    def __enter__(self) -> Monitor:
        self._stack = contextlib.ExitStack()
        self._stack.callback(self._curve.close)
        self._stack.callback(self._skipped.write)
        for tracker in self._trackers:
            self._stack.callback(tracker.close)
        self._stack.enter_context(self._watchdog)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def _tell(self, point: dict[str, Any]) -> None:
        self._on_point(point)
        for tracker in self._trackers:
            tracker.point(point)

    def step(self, step: int, done: Done, wait_s: float) -> None:
        """A step was made, before which data were waited for so long."""
        self._watchdog.beat(step)
        self._curve.add(done, wait_s)
        if self._warnings is not None:
            self._warnings.waited(wait_s)

    def patient(self) -> AbstractContextManager[None]:
        """Around what may take long without being stuck."""
        return self._watchdog.paused()

    def point(self, step: int, epoch: int, stepper: Stepper, **more: float) -> dict[str, Any]:
        """A point of the curve over the steps since the last one.

        Raises:
            NonFiniteLossError: too many steps in a row changed nothing.
            DivergenceError: the loss has left the range of its start.
        """
        point = self._curve.point(step, epoch, **more, **self._features)
        self._features = {}
        if self._flops is not None and self._peak is not None:
            point["mfu"] = round(mfu(self._flops, point["step_time_s"], self._peak, self._ranks.world_size), 4)
        self._curve.write(point)
        if self._warnings is not None:
            self._warnings.point()
        self._skipped.write()
        most = self._spec.guards.max_skipped_steps
        if point.get("skipped_steps") and stepper.worst_row >= most:  # read off the device only then
            raise NonFiniteLossError(
                f"loss or gradient was not finite in {int(stepper.worst_row)} steps in a row up to step {step}, "
                f"expected less than {most}; they were left out"
            )
        self._divergence.look(point)
        return point

    @property
    def suspicious(self) -> bool:
        """Whether a guard has begun to count; rank 0 knows."""
        return self._divergence.counts or self._collapse.counts

    def features(self, model: Spread, method: Method, streams: dict[str, Batch], views: Views) -> None:
        """Measures features for the next point of the curve, which is written whatever they say: see `checkpoint`."""
        if self._spec.guards.min_feature_std is None and self._spec.guards.min_rankme is None:
            return
        batch = streams if len(streams) > 1 else next(iter(streams.values()))
        with model.whole():
            features = features_of(method, batch, views)
        if features is not None and self._ranks.rank == 0:
            try:
                self._features = self._collapse.look(features)
            except CollapseError as error:
                self._collapsed = error

    def checkpoint(self, step: int, model: Spread) -> None:
        """What must hold before a checkpoint replaces the one before it.

        Raises:
            NonFiniteLossError: a weight is not finite.
            CollapseError: features have been all alike for two checkpoints.
        """
        if not model.finite():
            raise NonFiniteLossError(f"a weight became infinite or NaN at step {step}")
        self._curve.flush()  # the curve up to a checkpoint must outlive whatever comes after it
        if self._ranks.any(self._collapsed is not None):
            raise self._collapsed or CollapseError(f"features collapsed by step {step}, as rank 0 says")


def flops_of_step(
    spec: JobSpec, method: Method, readers: Mapping[str, Reader | StreamReader], views: Views, ranks: Ranks
) -> float | None:
    """FLOPs of an optimizer step over all ranks; None where the peak is not known or nothing can be counted."""
    if ranks.device.type == "cpu" or peak(ranks.device, spec.precision) is None:
        return None
    parts = spec.accumulation_on(1)
    streams = {}
    for name, reader in readers.items():
        with contextlib.closing(reader.batches(0, 1, 0, parts)) as batches:  # what is of one of so many ranks
            streams[name] = to_device(next(batches), views, torch.device("cpu"))
    batch = streams if len(streams) > 1 else next(iter(streams.values()))
    one = count(method, batch, LATER)
    return None if one is None else float(one * parts)
