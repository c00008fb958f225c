"""What a run says about itself while it trains: the curve, the samples that it skipped, what it waited for.

`metrics.jsonl` has one JSON line a point, written in batches, off the critical path.
"""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads.data.reader import Reader
from workloads.data.streaming import PROMISES, StreamReader
from workloads.ranks import Ranks
from workloads.record import write_atomic
from workloads.step import Done, Moment, seconds_between

logger = logging.getLogger(__name__)

FLUSH_S = 1.0
LOADER_BOUND_SHARE = 0.1  # of the time; less is not worth a core
OnPoint = Callable[[dict[str, Any]], None]


class NonFiniteLossError(RuntimeError):
    """The loss became NaN or infinite; the last checkpoint is from before that."""

    hint = "lower optimizer.lr, lengthen schedule.warmup_epochs, or set optimizer.clip_grad_norm"


class MetricsWriter:
    """Appends points to `metrics.jsonl`; only rank 0 has one."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab")  # noqa: SIM115
        self._drop_torn_line(path)
        self._lines: list[bytes] = []
        self._flushed = time.monotonic()

    def _drop_torn_line(self, path: Path) -> None:
        """A killed run may leave half a line, which the next point would otherwise continue."""
        text = path.read_bytes()
        whole = text.rfind(b"\n") + 1
        if whole != len(text):
            os.truncate(path, whole)

    def append(self, point: dict[str, Any]) -> None:
        self._lines.append(json.dumps(point).encode() + b"\n")
        if time.monotonic() - self._flushed > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        self._file.write(b"".join(self._lines))
        self._file.flush()
        self._lines.clear()
        self._flushed = time.monotonic()

    def close(self) -> None:
        self.flush()
        self._file.close()


class Curve:
    """Collects what steps report and turns it into a point of the curve every few steps.

    Losses stay on the device until a point is due, so a GPU is not waited for each step.
    """

    def __init__(self, ranks: Ranks, writer: MetricsWriter | None, on_point: OnPoint, batch_size: int) -> None:
        self._ranks, self._writer, self._on_point, self._batch_size = ranks, writer, on_point, batch_size
        self._reset()

    def _reset(self) -> None:
        self._losses: list[Tensor] = []
        self._metrics: dict[str, list[Tensor]] = {}
        self._skipped: list[Tensor] = []
        self._alone: list[tuple[Moment, Moment]] = []
        self._wait_s = 0.0
        self._since = time.perf_counter()

    def add(self, done: Done, wait_s: float) -> None:
        """A step, before which data were waited for so long."""
        if done.loss is not None:
            self._losses.append(done.loss)
        self._skipped.append(done.skipped)
        self._wait_s += wait_s
        self._alone.append(done.alone)
        for name, value in done.metrics.items():
            self._metrics.setdefault(name, []).append(value.detach())

    def point(self, step: int, epoch: int, **more: float) -> dict[str, Any]:
        """Means over the steps since the last point and over ranks, of what is finite; the same on every rank.

        Of this rank are `samples_per_s`, `step_time_s`, `memory_gib` and `data_wait_share`. `rank_skew` is how much
        longer the `slowest_rank` worked and waited for data than the fastest before gradients were exchanged, as a
        share of the time; see `Done.alone` for what hides it.

        Args:
            step: done steps.
            epoch: of the last of them.
            more: values of the moment, such as the learning rate.
        """
        steps = len(self._skipped)
        elapsed = time.perf_counter() - self._since
        series = {"loss": self._losses} | dict(sorted(self._metrics.items())) | {"skipped_steps": self._skipped}
        series = {name: values for name, values in series.items() if values}
        alone_s = torch.zeros(self._ranks.world_size, device=self._ranks.device)
        alone_s[self._ranks.rank] = self._wait_s + sum(seconds_between(*moments) for moments in self._alone)
        columns = [torch.stack(values).float() for values in series.values()] + [alone_s]
        *parts, alone_s = self._ranks.mean(torch.cat(columns)).split(
            [len(column) for column in columns]
        )  # one exchange
        means = {name: _finite_mean(values) for name, values in zip(series, parts, strict=True)}
        bad = steps * (means.pop("skipped_steps") or 0.0)
        point: dict[str, Any] = {"step": step, "epoch": epoch, "loss": means.pop("loss", None)} | more | means
        point["samples_per_s"] = round(steps * self._batch_size / elapsed, 1)
        point["step_time_s"] = round(elapsed / max(1, steps), 5)
        point["data_wait_share"] = round(self._wait_s / elapsed, 4)
        point["memory_gib"] = round(_memory_gib(self._ranks.device), 3)
        if self._ranks.world_size > 1:
            by_rank = (alone_s * self._ranks.world_size).tolist()
            point["rank_skew"] = round((max(by_rank) - min(by_rank)) / elapsed, 4)
            point["slowest_rank"] = by_rank.index(max(by_rank))
        if bad:
            point["skipped_steps"] = round(bad)
        self._reset()
        return point

    def write(self, point: dict[str, Any]) -> None:
        if self._writer is not None:
            self._writer.append(point)
            self._on_point(point)

    def flush(self) -> None:
        if self._writer is not None:
            self._writer.flush()

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()


def _finite_mean(values: Tensor) -> float | None:
    """None where nothing is finite: JSON has no other name for it."""
    finite = values[values.isfinite()]
    return finite.mean().item() if len(finite) else None


def _memory_gib(device: torch.device) -> float:
    """The most that this process held so far: of the GPU where there is one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


class Warnings:
    """What the person who submitted the job should know, in `warnings.txt`; of one rank.

    Sources without the promises of a manifest; what was found when the run went on (`notes`); and that the model waits
    for data, with how many cores would feed it.
    """

    def __init__(self, path: Path, readers: Mapping[str, Reader | StreamReader], notes: list[str]) -> None:
        self._path, self._readers = path, readers
        self._wait_s = self._busy_s = 0.0
        self._since: float | None = None  # the first steps fill the loader and warm the model up
        self._cores = 0
        self._lines = [f"{name}: {PROMISES}" for name, reader in readers.items() if isinstance(reader, StreamReader)]
        self._lines += notes
        for line in self._lines:
            logger.warning("%s", line)
        self._write(self._lines)

    def _write(self, lines: list[str]) -> None:
        if lines:
            write_atomic(self._path, "".join(f"{line}\n" for line in lines))

    def waited(self, seconds: float) -> None:
        self._wait_s += seconds

    def point(self) -> None:
        """Looks at the steps since the first point."""
        now, busy_s = time.perf_counter(), sum(reader.busy_s for reader in self._readers.values())
        if self._since is None:
            self._since, self._busy_s, self._wait_s = now, busy_s, 0.0
            return
        elapsed = now - self._since
        if self._wait_s <= LOADER_BOUND_SHARE * elapsed:
            return
        cores = math.ceil((busy_s - self._busy_s) / max(1e-9, elapsed - self._wait_s))
        if cores != self._cores:
            self._cores = cores
            bound = (
                f"loader-bound: {cores} cores needed for this model, which waits for data "
                f"{self._wait_s / elapsed:.0%} of the time; set resources.loader_workers: {cores}"
            )
            self._write([*self._lines, bound])


class SkippedLog:
    """Appends newly skipped samples of this rank to `skipped.txt`, a line each."""

    def __init__(self, path: Path, readers: Mapping[str, Reader | StreamReader]) -> None:
        self._path, self._readers, self._known = path, readers, 0

    def quarantined(self) -> None:
        """What the manifests set aside; for one rank to say, once."""
        lines = [line for reader in self._readers.values() for line in reader.manifest.quarantined]
        if lines and not self._path.exists():
            self._path.write_text("".join(f"{line}\n" for line in lines))

    def write(self) -> None:
        lines = [why for reader in self._readers.values() for why in list(reader.skipped.values())]
        if len(lines) > self._known:
            with open(self._path, "a") as file:
                file.write("".join(f"{line}\n" for line in lines[self._known :]))
            self._known = len(lines)
