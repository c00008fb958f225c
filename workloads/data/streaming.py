"""Sources that cannot be indexed (`pipe:` commands), read by the webdataset library as they come.

What is promised of indexed shards is not given here: samples may be seen more or less than once an epoch, the
order depends on the number of ranks, and a resumed run reads its sources from their start. `PROMISES` says so, in
the log and in the record of the job.
"""

from __future__ import annotations

import contextlib
import hashlib
import tarfile
import time
from collections.abc import Generator, Iterator
from itertools import count
from typing import Any

import numpy as np
import torch

from workloads.data.ahead import ahead
from workloads.data.columns import Keys, Manifest, Places
from workloads.data.decode import ImageError
from workloads.data.keys import sample_keys
from workloads.data.modalities import Loaded, Views, check, collate, load
from workloads.data.order import WINDOW, permutation
from workloads.data.reader import PREFETCH, pinned
from workloads.data.shards import DataError, some
from workloads.data.tarscan import member_name

PROMISES = (
    "read as a stream, which cannot be indexed: not exactly once an epoch, another order on another number of workers, "
    "and a resumed run starts its sources again"
)
MAX_BUFFERED = 1000  # samples, encoded: the shuffle of a stream


def stream_manifest(shards: str | list[str], epoch_samples: int, num_classes: int) -> Manifest:
    """Stands for a stream where a manifest is asked for facts; samples have numbers, but no places and no memory."""
    urls = [shards] if isinstance(shards, str) else shards
    none = np.broadcast_to(np.int64(-1), epoch_samples)
    return Manifest(
        shards=tuple(urls),
        shard_bytes=(),
        keys=Keys(np.broadcast_to(np.int64(0), epoch_samples), np.empty(0, np.uint8)),
        shard=np.broadcast_to(np.int32(0), epoch_samples),
        label=none,
        members={"image": Places(none, none)},
        primary="image",
        classes=[str(number) for number in range(num_classes)],
        content_hash=f"stream-{hashlib.sha256(chr(0).join(urls).encode()).hexdigest()}",
        total_bytes=0,
        quarantined=[],
    )


class StreamReader:
    """The interface of `Reader` over a stream; see the module for what it does not promise.

    Attributes:
        steps_per_epoch: batches until the stated number of samples was seen.
        skipped: number of the sample -> why it could not be decoded.
        busy_s: seconds of work that the batches given out so far have cost.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: Views,
        *,
        batch_size: int,
        seed: int = 0,
        max_bad_share: float = 0.01,
        window: int = WINDOW,
    ) -> None:
        """Opens nothing yet; the arguments are those of `Reader`.

        Raises:
            DataError: an epoch is shorter than a batch.
        """
        check(views)
        if len(manifest) < batch_size:
            raise DataError(f"got epoch_samples={len(manifest)}, expected at least batch_size={batch_size}; raise it")
        self.manifest, self.views, self.batch_size, self.seed = manifest, dict(views), batch_size, seed
        self.max_bad_share, self._buffered = max_bad_share, min(window, MAX_BUFFERED, len(manifest))
        self.steps_per_epoch = len(manifest) // batch_size
        self.skipped: dict[int, str] = {}
        self.busy_s = 0.0

    def batches(
        self, start: int, stop: int, rank: int = 0, world_size: int = 1, *, pin_memory: bool = False
    ) -> Generator[dict[str, Any], None, None]:
        """The batches of steps start..stop-1 of this rank, made ahead by a thread; the stream itself starts anew."""
        return ahead(self._made(start, stop, rank, world_size, pin_memory), PREFETCH)

    def _made(
        self, start: int, stop: int, rank: int, world_size: int, pin_memory: bool
    ) -> Generator[dict[str, Any], None, None]:
        size = self.batch_size * (rank + 1) // world_size - self.batch_size * rank // world_size
        with contextlib.closing(self._samples(start, rank, world_size)) as source:
            samples = self._shuffled(source, start)
            for step in range(start, stop):
                began = time.perf_counter()
                batch = self._batch(samples, size, step // self.steps_per_epoch)
                self.busy_s += time.perf_counter() - began
                yield pinned(batch) if pin_memory else batch

    def _batch(self, samples: Iterator[tuple[int, dict[str, Any]]], size: int, epoch: int) -> dict[str, Any]:
        numbers: list[int] = []
        labels: list[int] = []
        loaded: list[Loaded] = []
        while len(loaded) < size:
            number, sample = next(samples)
            key = sample_keys(self.seed, epoch, torch.tensor([number]))
            try:
                loaded.append(load(self.views, _members(sample, self.views), key, 0))
            except ImageError as error:
                self._skip(number, f"{sample['__url__']}: {sample['__key__']}: {error}")
                continue
            numbers.append(number)
            labels.append(_label(sample))
        index = torch.tensor(numbers)
        keys = sample_keys(self.seed, epoch, index)
        return {"index": index, "key": keys, "label": torch.tensor(labels)} | collate(self.views, loaded, keys)

    def _samples(self, start: int, rank: int, world_size: int) -> Generator[tuple[int, dict[str, Any]], None, None]:
        """(number, sample) of this rank without end: of its own sources where there are enough, else in turn of all."""
        import webdataset

        urls, n = list(self.manifest.shards), len(self.manifest)
        own = len(urls) >= world_size
        mine = urls[rank::world_size] if own else urls
        for turn in count():
            order = permutation(self.seed, start, turn, len(mine))
            source = webdataset.WebDataset([mine[i] for i in order], shardshuffle=False, empty_check=False)
            i = -1
            try:
                for i, sample in enumerate(source):
                    if own:
                        yield (i * world_size + rank) % n, sample
                    elif i % world_size == rank:
                        yield i % n, sample
            except (OSError, tarfile.TarError) as error:
                raise DataError(f"got {error}, expected a tar archive from each of {some(mine)}; run them") from error
            if i < 0:
                raise DataError(f"got no sample from {some(mine)}, expected a tar archive from each; run them")

    def _shuffled(
        self, samples: Iterator[tuple[int, dict[str, Any]]], start: int
    ) -> Iterator[tuple[int, dict[str, Any]]]:
        """Each sample that comes in takes the place of one that goes out."""
        buffer: list[tuple[int, dict[str, Any]]] = []
        draws = np.random.Philox(key=[self.seed, start])
        for sample in samples:
            if len(buffer) < self._buffered:
                buffer.append(sample)
            else:
                place = int(draws.random_raw()) % len(buffer)
                buffer[place], out = sample, buffer[place]
                yield out

    def _skip(self, number: int, why: str) -> None:
        self.skipped[number] = why
        if len(self.skipped) > self.max_bad_share * len(self.manifest):
            raise DataError(
                f"got {len(self.skipped)} of {len(self.manifest)} samples that cannot be decoded, expected at most a "
                f"share of {self.max_bad_share}: {some(list(self.skipped.values()), 20)}"
            )


def _members(sample: dict[str, Any], views: Views) -> dict[str, list[bytes]]:
    named: dict[str, bytes] = {}
    for suffix, data in sample.items():
        if isinstance(data, bytes):
            named.setdefault(member_name(suffix), data)
    return {view.member: [named.get(view.member, b"")] for view in views.values()}


def _label(sample: dict[str, Any]) -> int:
    text = sample.get("cls", b"").strip()
    return int(text) if text.isdigit() and len(text) < 10 else -1
