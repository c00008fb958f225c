"""Checkpoints of a training run: written while it goes on, whole or not there.

    save:     copy the state aside (all that training waits for) -> thread: write, seal, `latest`, prune, mirror
    restore:  newest whole one, on the disk or in the mirror -> every rank

Learning rate, data position and randomness are functions of the step; what else a resumed run needs, the loop gives
as `extra`. A full disk or a kill while writing leaves the previous checkpoint whole. The files are described in
`workloads.checkpoint_folder`; those of a sharded method in `workloads.checkpoint_sharded`.
"""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any

import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import CheckpointError, FileSum, Seal, latest_step, stem
from workloads.checkpoint_mirror import Mirror
from workloads.checkpoint_newest import Found, Note, first_line, in_parts, newest
from workloads.checkpoint_state import Buffers, broadcast, load, write
from workloads.data.sources import RETRY_DELAYS_S
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec_training import CheckpointPolicy

__all__ = ["CheckpointError", "Checkpoints", "Restored", "latest_step", "restore_weights"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """What a run continues from.

    Attributes:
        step: optimizer steps done; 0: nothing was there.
        extra: what the loop gave to `save`.
        notes: what went wrong on the way, for the log, the warnings and the events.
    """

    step: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)


class Checkpoints:
    """The checkpoints of one run; every rank has one, and every rank calls every method.

    One write at a time goes on beside training, in a thread. When it fails, the next call raises CheckpointError on
    the ranks that wrote (rank 0, all when sharded), and `latest` still names the checkpoint before.
    """

    def __init__(
        self,
        folder: Path,
        policy: CheckpointPolicy,
        ranks: Ranks,
        *,
        sharded: bool = False,
        mirror_delays_s: Sequence[float] = RETRY_DELAYS_S,
    ) -> None:
        """Starts nothing but, when sharded, a process group.

        Args:
            folder: `checkpoints` of the run; all ranks see it when sharded, else only rank 0 needs to.
            policy: which checkpoints stay, and where their copies are.
            ranks: those of the run.
            sharded: the parameters of the method are shared out (FSDP).
            mirror_delays_s: pauses between tries to reach the mirror.
        """
        self._folder, self._policy, self._ranks = folder, policy, ranks
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._written: Future[None] | None = None
        self._mirrored: Future[bool] | None = None
        self._next_waits = Event()  # then a mirror that does not answer must not hold it up
        self._mirror = None
        if policy.mirror is not None and ranks.rank == 0:
            name, wait = folder.parent.name, self._next_waits.wait
            self._mirror = Mirror(policy.mirror, name, policy, wait=wait, delays_s=mirror_delays_s)
        self._buffers = Buffers()
        self._sharded = None
        if sharded and ranks.world_size > 1:
            from workloads.checkpoint_sharded import ShardedWriter

            self._sharded = ShardedWriter(folder, ranks)

    def restore(self, method: nn.Module, optimizer: Optimizer | None = None) -> Restored:
        """Loads the newest whole checkpoint in place, whichever number of ranks has written it.

        Raises:
            CheckpointError: there are some and none is whole, or it is of another model.
        """
        found = self._find()
        if found.seal is None:
            return Restored()
        if in_parts(found.seal):
            state = _read_parts(self._folder, found.seal, method, optimizer)
        else:
            state = broadcast(found.state, self._ranks)
        _load(state, method, optimizer, found.seal)
        return Restored(found.seal.step, state["extra"], found.notes)

    def _find(self) -> Found:
        """What rank 0 finds; the state, unless it is in parts, is at rank 0 only."""
        found: Found | CheckpointError = Found()
        if self._ranks.rank == 0:
            try:
                found = newest(self._folder, self._mirror)
            except CheckpointError as error:
                found = error
        if self._ranks.world_size > 1:
            box = [replace(found, state=None) if isinstance(found, Found) else found]
            dist.broadcast_object_list(box, device=self._ranks.device)
            found = found if self._ranks.rank == 0 else box[0]
        if isinstance(found, CheckpointError):
            raise found
        return found

    def save(
        self,
        step: int,
        method: nn.Module,
        optimizer: Optimizer,
        *,
        extra: dict[str, Any],
        metric: float | None,
        suspect: bool = False,
    ) -> None:
        """Returns when the state is copied; waits before that for the write of the one before.

        Args:
            step: optimizer steps done.
            method: its `state_dict` is saved.
            optimizer: the same.
            extra: tensors, numbers and texts that `restore` gives back.
            metric: of `policy.metric` at this step; None or not finite: it is never among the best.
            suspect: rank 0 says whether a guard has begun to count.

        Raises:
            CheckpointError: the one before could not be written.
        """
        self._wait_for_write()
        if self._sharded is not None:
            put = self._sharded.copy(step, method, optimizer, extra)
        elif self._ranks.rank == 0:
            put = self._copy(step, method, optimizer, extra)
        else:
            return
        self._next_waits.set()
        self._written = self._thread.submit(self._write, step, put, metric, suspect)
        if self._mirror is not None:
            self._mirrored = self._thread.submit(self._send, self._mirror)

    def wait(self) -> None:
        """Until all that was saved is on the disk, and in the mirror unless that stays away.

        Raises:
            CheckpointError: it could not be written.
        """
        self._wait_for_write()
        if self._mirrored is not None:
            self._mirrored.result()

    @contextlib.contextmanager
    def back_after(self, *guards: type[Exception]) -> Iterator[None]:
        """Around what all ranks leave by the same of these errors: a later attempt goes on from before its first sign.

        An event says from where. What is suspect stays on the disk until that attempt has its next checkpoint.
        """
        try:
            yield
        except guards as error:
            if self._ranks.rank == 0:
                self._go_back(type(error).__name__)
            self._ranks.barrier()  # a rank that ends takes the others with it
            raise

    def _go_back(self, why: str) -> None:
        if self._written is not None:
            self._written.exception()  # waited for; `close` tells of it
        ended = latest_step(self._folder)
        step = files.go_back(self._folder)
        if step == ended:
            return
        told = "none from before is kept: clone the job to start anew"
        if step is not None:
            told = f"a later attempt goes on from step {step}"
            if self._mirror is not None:
                self._mirrored = self._thread.submit(self._send, self._mirror)
                self._mirrored.result()
        signs = f"{why}: the checkpoint of step {ended} was written after its first sign"
        RunFolder(self._folder.parent).event("went_back", f"{signs}; {told}")

    def close(self) -> None:
        """Waits and ends the thread.

        Raises:
            CheckpointError: the last one could not be written.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            logger.error("%s", failure)  # the error that ends the run is the one to see

    def _copy(
        self, step: int, method: nn.Module, optimizer: Optimizer, extra: dict[str, Any]
    ) -> Callable[[], dict[str, FileSum]]:
        state = {"step": step, "method": method.state_dict(), "optimizer": optimizer.state_dict(), "extra": extra}
        state = self._buffers.copy(state)
        path = self._folder / f"{stem(step)}.pt"
        return lambda: {path.name: write(path, state)}

    def _write(self, step: int, put: Callable[[], dict[str, FileSum]], metric: float | None, suspect: bool) -> None:
        self._next_waits.clear()
        began = time.perf_counter()
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            sums = put()
            if self._ranks.rank == 0:
                finite = metric if metric is not None and math.isfinite(metric) else None
                took = round(time.perf_counter() - began, 3)
                seal = Seal(step=step, files=sums, metric=finite, time=time.time(), seconds=took, suspect=suspect)
                files.complete(self._folder, seal)
                files.prune(self._folder, self._policy, step)
        except (OSError, RuntimeError) as error:  # torch's zip writer answers a full disk with a RuntimeError
            raise CheckpointError(
                f"checkpoint of step {step} could not be written to {self._folder}: {error}",
                "free disk space, then submit again: the run continues from the checkpoint before",
            ) from error

    def _send(self, mirror: Mirror) -> bool:
        return mirror.update(self._folder) and mirror.send_log(RunFolder(self._folder.parent).log)

    def _wait_for_write(self) -> None:
        written, self._written = self._written, None
        if written is not None:
            written.result()


def restore_weights(folder: Path, method: nn.Module) -> int:
    """Loads the method of the newest whole checkpoint, in one process -> its step, 0 where there is none.

    Raises:
        CheckpointError: there are some and none is whole, or it is of another model.
    """
    found = newest(folder)
    for note in found.notes:
        logger.warning("%s", note.text)
    if found.seal is None:
        return 0
    state = _read_parts(folder, found.seal, method, None) if in_parts(found.seal) else found.state
    assert state is not None
    _load(state, method, None, found.seal)
    return found.seal.step


def _read_parts(folder: Path, seal: Seal, method: nn.Module, optimizer: Optimizer | None) -> dict[str, Any]:
    from workloads.checkpoint_sharded import UNREADABLE, read

    try:
        return read(folder / seal.name, method, optimizer)
    except UNREADABLE as error:
        raise CheckpointError(
            f"checkpoint {folder / seal.name} cannot be read: {first_line(error)}",
            "a sharded checkpoint is read by all ranks: put the runs on storage that every node sees",
        ) from error


def _load(state: dict[str, Any], method: nn.Module, optimizer: Optimizer | None, seal: Seal) -> None:
    try:
        load(state, method, optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"checkpoint of step {seal.step} does not fit the model: {error}",
            "submit the job with the method, model and optimizer that wrote it, or under another name to start anew",
        ) from error
