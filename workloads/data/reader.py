"""Which samples a rank looks at in which step, and what it sees: a function of (manifest, seed, step, world size).

A Reader holds no position. Any step can be asked for first, by any number of ranks and loader workers: resuming is to
start at another step, and the union over ranks is the same for every world size.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from typing import Any

import torch
from torch import Tensor

from workloads.data.ahead import ahead
from workloads.data.allocator import keep_freed_memory
from workloads.data.columns import Manifest
from workloads.data.decode import ImageError
from workloads.data.keys import mix, sample_keys
from workloads.data.modalities import Loaded, Views, check, collate, load
from workloads.data.order import WINDOW, Rows, Sampler, Uniform
from workloads.data.ranged import read_members
from workloads.data.samplers import SamplerConfig
from workloads.data.shards import DataError, some

Batch = dict[str, Any]

PREFETCH = 2  # batches ahead of the consumer, for each loader worker
OWN = ("index", "key", "label")


class Reader:
    """Batches of a manifest through the views of a method. Pickles; safe to use from several threads.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        skipped: manifest row -> "file: member at offset N: why" of samples that this process could not decode.
        busy_s: seconds of work that the batches given out so far have cost their loader.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        max_bad_share: float = 0.01,
        window: int = WINDOW,
        sampler: SamplerConfig | None = None,
        workers: int = 0,
    ) -> None:
        """Reads nothing yet.

        Args:
            manifest: the samples.
            views: what each sample is looked at through, by the name in the batch.
            batch_size: global, over all ranks.
            seed: of order and keys.
            shuffle: False gives the order of the manifest.
            drop_last: leave out what does not fill a batch; else the last batch of an epoch is shorter, and the
                shares of the ranks differ by one sample, down to none.
            max_bad_share: of the manifest's samples that this process may fail to decode; above it a batch raises.
            window: about how many samples are mixed one by one.
            sampler: which rows make a batch, where that is not a plain shuffle.
            workers: processes that make batches; 0: a thread of this one.

        Raises:
            DataError: not even one batch fits, or the samples lack what a view looks at.
        """
        assert batch_size > 0 and not views.keys() & set(OWN)
        if not manifest.indexed:
            raise DataError(f"got the stream {manifest.shards[0]}, expected shards that can be indexed; write some")
        check(views)
        for view in views.values():
            manifest.places(view.member)
        self.manifest, self.views, self.seed, self.max_bad_share = manifest, dict(views), seed, max_bad_share
        self.workers = workers
        self.sampler: Sampler = (
            Uniform(
                len(manifest),
                batch_size,
                seed=seed,
                shuffle=shuffle,
                drop_last=drop_last,
                window=window,
            )
            if sampler is None
            else sampler.over(manifest.label, batch_size, seed)
        )
        self.steps_per_epoch = self.sampler.steps_per_epoch
        self.skipped: dict[int, str] = {}
        self.busy_s = 0.0

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows of a rank's share: the `rank`-th contiguous part of the global batch.

        Args:
            step: global; the epoch is step // steps_per_epoch.
            rank: of `world_size`.
            world_size: processes that share the batch.
        """
        rows = self.sampler.batch(*divmod(step, self.steps_per_epoch))
        return rows[len(rows) * rank // world_size : len(rows) * (rank + 1) // world_size]

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """What a rank looks at in a step.

        A sample that cannot be decoded is counted in `skipped`; a good one, drawn by the key of the bad one from the
        whole set (or from what the sampler calls alike), takes its place, with its own index, key and label: shapes
        stay, whatever the world size.

        Returns:
            what `collate` returns of the views, and: `index` int64 [b], the row; `key` int64 [b], a random key of
            (seed, epoch, index); `label` int64 [b], -1 where there is none.

        Raises:
            DataError: a shard vanished or changed, or too many samples cannot be decoded.
        """
        rows, samples = self._samples(self.rows(step, rank, world_size), step // self.steps_per_epoch)
        index = torch.from_numpy(rows)
        keys = sample_keys(self.seed, step // self.steps_per_epoch, index)
        batch: Batch = {"index": index, "key": keys, "label": torch.from_numpy(self.manifest.label[rows])}
        return batch | collate(self.views, samples, keys)

    def batches(
        self, start: int, stop: int, rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
    ) -> Generator[Batch, None, None]:
        """The batches of steps start..stop-1, made ahead by a thread or by worker processes.

        Closing the generator ends them; what they raise is raised at the step where it happened.

        Args:
            start: first step.
            stop: the step after the last.
            rank: of `world_size`.
            world_size: processes that share each batch.
            pin_memory: whether tensors are put where a GPU can fetch them.
        """
        made = (
            self._in_processes(start, stop, rank, world_size, pin_memory)
            if self.workers
            else ahead((self._timed(step, rank, world_size, pin_memory) for step in range(start, stop)), PREFETCH)
        )
        try:
            for batch, skipped, busy_s in made:
                self._expect_few(skipped)
                self.busy_s += busy_s
                yield batch
        finally:
            made.close()

    def _timed(
        self, step: int, rank: int, world_size: int, pin_memory: bool = False
    ) -> tuple[Batch, dict[int, str], float]:
        """A batch, what was skipped in making it, and how long that took."""
        began, known = time.perf_counter(), set(self.skipped)
        batch = self.batch(step, rank, world_size)
        new = {row: why for row, why in self.skipped.items() if row not in known}
        return pinned(batch) if pin_memory else batch, new, time.perf_counter() - began

    def _in_processes(
        self, start: int, stop: int, rank: int, world_size: int, pin_memory: bool
    ) -> Generator[tuple[Batch, dict[int, str], float], None, None]:
        loader = torch.utils.data.DataLoader(
            _Steps(self, rank, world_size),
            sampler=range(start, stop),
            batch_size=None,
            num_workers=self.workers,
            prefetch_factor=PREFETCH,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            # A fork of a process with threads (Ray's, CUDA's) may hang.
            multiprocessing_context="forkserver",
        )
        made: Iterator[Any] = iter(loader)
        try:
            for one in made:
                if isinstance(one, DataError):
                    raise one
                yield one
        finally:
            shut_down = getattr(made, "_shutdown_workers", None)  # else they live until the garbage is collected
            if shut_down is not None:
                shut_down()

    def _samples(self, rows: Rows, epoch: int) -> tuple[Rows, list[Loaded]]:
        """The rows that can be decoded, replacements in the places of the others, and what was decoded."""
        rows = rows.copy()
        samples: list[Loaded | None] = [None] * len(rows)
        missing = list(range(len(rows)))
        members = dict.fromkeys(view.member for view in self.views.values())
        for attempt in range(1, 1000):
            wanted = [place for place in missing if int(rows[place]) not in self.skipped]
            read = {member: read_members(self.manifest, member, rows[wanted]) for member in members}
            keys = sample_keys(self.seed, epoch, torch.from_numpy(rows[wanted]))
            for i, place in enumerate(wanted):
                try:
                    samples[place] = load(self.views, read, keys, i)
                except ImageError as error:
                    self._expect_few({int(rows[place]): f"{self.manifest.where(int(rows[place]))}: {error}"})
            missing = [place for place in missing if samples[place] is None]
            if not missing:
                return rows, [sample for sample in samples if sample is not None]
            draws = mix(sample_keys(self.seed, epoch, torch.from_numpy(rows[missing])) + attempt).numpy()
            for place, draw in zip(missing, draws, strict=True):
                pool = self.sampler.alike(int(rows[place]))
                rows[place] = draw % len(self.manifest) if pool is None else pool[draw % len(pool)]
        raise DataError(f"got no sample that can be decoded in 1000 draws: {some(list(self.skipped.values()))}")

    def _expect_few(self, skipped: dict[int, str]) -> None:
        self.skipped.update(skipped)
        bad, n = len(self.skipped), len(self.manifest)
        if skipped and bad > self.max_bad_share * n:
            raise DataError(
                f"got {bad} of {n} samples that cannot be decoded, expected at most a share of {self.max_bad_share}; "
                f"repair them or raise max_bad_share: {some(list(self.skipped.values()), 20)}"
            )


def pinned(batch: Batch) -> Batch:
    """The batch in memory from which a GPU can copy by itself."""
    return {name: value.pin_memory() if isinstance(value, Tensor) else value for name, value in batch.items()}


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)
    keep_freed_memory()


class _Steps(torch.utils.data.Dataset[Any]):
    """Steps of a rank by number, for worker processes."""

    def __init__(self, reader: Reader, rank: int, world_size: int) -> None:
        self._reader, self._rank, self._world_size = reader, rank, world_size

    def __getitem__(self, step: int) -> Any:
        try:
            return self._reader._timed(step, self._rank, self._world_size)
        except DataError as error:
            return error  # torch would wrap it into a trace as text
