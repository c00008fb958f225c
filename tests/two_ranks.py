"""Two processes that train together over gloo, started once for the whole run: a start costs seconds."""

from __future__ import annotations

import gc
import queue
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.train import train

LIMIT_S = 120.0
Around = Callable[[int], AbstractContextManager[None]]


class TwoRanks:
    """Trains jobs one after the other."""

    def __init__(self) -> None:
        self._processes: list[Any] = []

    def train(self, spec: JobSpec, run: RunFolder, home: Path, store: Path, around: Around = nullcontext) -> None:
        """Trains a job to its end on both.

        Args:
            spec: the job, of two workers.
            run: its folder.
            home: where its teachers are.
            store: a file that does not exist, by which the ranks find each other.
            around: of a rank's number; it trains within.

        Raises:
            AssertionError: one of them failed, with its trace.
        """
        if not self._processes:
            self._start()
        for inbox in self._inboxes:
            inbox.put((spec.model_dump_json(), run.path, home, store, around))
        try:
            failures = [self._outbox.get(timeout=LIMIT_S) for _ in self._processes]
        except queue.Empty:
            failures = ["a rank did not end"]
        if any(failures):
            self.end()  # the other one may wait for ever
        assert not any(failures), "\n".join(failures)

    def _start(self) -> None:
        context = torch.multiprocessing.get_context("spawn")
        self._inboxes, self._outbox = [context.Queue() for _ in (0, 1)], context.Queue()
        self._processes = [
            context.Process(target=_rank, args=(rank, self._inboxes[rank], self._outbox), daemon=True)
            for rank in (0, 1)
        ]
        for process in self._processes:
            process.start()

    def end(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._processes = []


def _rank(rank: int, inbox: Any, outbox: Any) -> None:
    torch.set_num_threads(1)
    while True:
        spec, run, home, store, around = inbox.get()
        try:
            dist.init_process_group("gloo", store=dist.FileStore(str(store), 2), rank=rank, world_size=2)
            with around(rank):
                assert train(JobSpec.model_validate_json(spec), RunFolder(run), home, Ranks(rank, 2))
            gc.collect()  # DDP goes before gloo, see `workloads.ray_train`
            dist.destroy_process_group()
            gc.freeze()  # what is left is modules, which the collection after the next job need not look at
            outbox.put("")
        except Exception:
            outbox.put(f"rank {rank}: {traceback.format_exc()}")


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[TwoRanks]:
    ranks = TwoRanks()
    yield ranks
    ranks.end()
