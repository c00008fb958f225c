"""Which samples a rank looks at in which step, and what it sees: a function of (manifest, seed, step, world size).

A Reader holds no position. Any step can be asked for first, by any number of ranks: resuming is to start at another
step, and the union over ranks is the same for every world size.

The order of an epoch: blocks of neighbouring samples are permuted over the whole set, a
window of some blocks is shuffled sample by sample. So reads stay near each other, and a
set that is sorted by class comes out mixed. Only the blocks are permuted as a whole; samples
are permuted when their window is reached, so the cost to start does not grow with the set.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from workloads.data.decode import ImageError, decode
from workloads.data.keys import mix, sample_keys
from workloads.data.manifest import DataError, Manifest
from workloads.data.ranged import read_images
from workloads.data.shards import some
from workloads.data.transforms.image import execute
from workloads.data.views import View

Batch = dict[str, Tensor]
Rows = NDArray[np.int64]

MIN_BLOCK, MAX_BLOCK = 64, 256  # samples
BLOCK_BYTES = 4 << 20  # a block of large images has fewer samples
PREFETCH = 2  # batches ahead of the consumer


class Reader:
    """Batches of a manifest through the views of a method. Pickles; safe to use from several threads.

    Attributes:
        steps_per_epoch: global batches in an epoch.
        skipped: manifest row -> "file: member at offset N: why" of samples that this process could not decode.
    """

    def __init__(
        self,
        manifest: Manifest,
        views: dict[str, View],
        *,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        max_bad_share: float = 0.01,
        window_blocks: int = 16,
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
            window_blocks: blocks that are mixed sample by sample.

        Raises:
            DataError: not even one batch fits.
        """
        assert batch_size > 0 and window_blocks > 0 and not views.keys() & {"index", "key", "label"}
        if len(manifest) < (batch_size if drop_last else 1):
            raise DataError(
                f"got batch_size={batch_size} for {len(manifest)} samples, expected at most as many; "
                f"use batch_size={len(manifest)} or less, or more samples"
            )
        self.manifest, self.views, self.seed, self.shuffle = manifest, dict(views), seed, shuffle
        self.batch_size, self.max_bad_share, self.window_blocks = batch_size, max_bad_share, window_blocks
        self.steps_per_epoch = len(manifest) // batch_size if drop_last else -(-len(manifest) // batch_size)
        self.skipped: dict[int, str] = {}
        mean_bytes = max(1, int(manifest.image_length.mean()))
        self._block = min(MAX_BLOCK, max(MIN_BLOCK, BLOCK_BYTES // mean_bytes))

    def order(self, epoch: int) -> Rows:
        """All rows in the order of an epoch: int64 [N], a pure function of (seed, epoch)."""
        return self._ordered(epoch, 0, len(self.manifest))

    def rows(self, step: int, rank: int = 0, world_size: int = 1) -> Rows:
        """The rows of a rank's share: the `rank`-th contiguous part of the global batch.

        Args:
            step: global; the epoch is step // steps_per_epoch.
            rank: of `world_size`.
            world_size: processes that share the batch.
        """
        epoch, position = divmod(step, self.steps_per_epoch)
        start = position * self.batch_size
        size = min(self.batch_size, len(self.manifest) - start)
        return self._ordered(epoch, start + size * rank // world_size, start + size * (rank + 1) // world_size)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> Batch:
        """What a rank looks at in a step.

        A sample that cannot be decoded is counted in `skipped`; a good one, drawn from the whole set by the key of the
        bad one, takes its place, with its own index, key and label: shapes stay, whatever the world size.

        Returns:
            for each view NAME: `NAME` uint8 [b, 3, size, size] and `NAME_box` float32 [b, 4] (x0, y0, x1, y1
            relative to the image); `index` int64 [b], the row; `key` int64 [b], a random key of (seed, epoch, index);
            `label` int64 [b], -1 where there is none.

        Raises:
            DataError: a shard vanished or changed, or too many samples cannot be decoded.
        """
        rows, images = self._images(self.rows(step, rank, world_size), step // self.steps_per_epoch)
        index = torch.from_numpy(rows)
        keys = sample_keys(self.seed, step // self.steps_per_epoch, index)
        batch: Batch = {"index": index, "key": keys, "label": torch.from_numpy(self.manifest.label[rows])}
        for name, view in self.views.items():
            batch[name], geometry = execute(view, images, keys, salt=name)
            batch[f"{name}_box"] = geometry.box
        return batch

    def batches(self, start: int, stop: int, rank: int = 0, world_size: int = 1) -> Generator[Batch, None, None]:
        """The batches of steps start..stop-1, made ahead in a thread.

        Closing the generator ends the thread; what the thread raises is raised at the step where it happened.
        """
        pending: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(1, thread_name_prefix="reader") as pool:
            try:
                for step in range(start, stop):
                    pending.append(pool.submit(self.batch, step, rank, world_size))
                    if len(pending) > PREFETCH:
                        yield pending.popleft().result()
                while pending:
                    yield pending.popleft().result()
            finally:
                for future in pending:
                    future.cancel()

    def _ordered(self, epoch: int, start: int, stop: int) -> Rows:
        """Positions start..stop-1 of the order of an epoch."""
        if not self.shuffle:
            return np.arange(start, stop)
        n = len(self.manifest)
        windows, starts = _layout(self.seed, epoch, n, self._block, self.window_blocks)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        parts = [_window(self.seed, epoch, w, n, self._block, windows[w]) for w in range(first, last)]
        rows: Rows = np.concatenate(parts) if parts else np.empty(0, np.int64)
        return rows[start - starts[first] : stop - starts[first]]

    def _images(self, rows: Rows, epoch: int) -> tuple[Rows, list[NDArray[np.uint8]]]:
        """The rows that can be decoded, replacements in the places of the others, and their pixels."""
        rows = rows.copy()
        images: list[NDArray[np.uint8] | None] = [None] * len(rows)
        missing = list(range(len(rows)))
        for attempt in range(1, 1000):
            wanted = [place for place in missing if int(rows[place]) not in self.skipped]
            for place, data in zip(wanted, read_images(self.manifest, rows[wanted]), strict=True):
                try:
                    images[place] = decode(data)
                except ImageError as error:
                    self._skip(int(rows[place]), str(error))
            missing = [place for place in missing if images[place] is None]
            if not missing:
                return rows, [image for image in images if image is not None]
            draws = mix(sample_keys(self.seed, epoch, torch.from_numpy(rows[missing])) + attempt)
            rows[missing] = (draws % len(self.manifest)).numpy()
        raise DataError(f"got no sample that can be decoded in 1000 draws: {some(list(self.skipped.values()))}")

    def _skip(self, row: int, why: str) -> None:
        self.skipped[row] = f"{self.manifest.where(row)}: {why}"
        bad, n = len(self.skipped), len(self.manifest)
        if bad > self.max_bad_share * n:
            raise DataError(
                f"got {bad} of {n} samples that cannot be decoded, expected at most a share of {self.max_bad_share}; "
                f"repair them or raise max_bad_share: {some(list(self.skipped.values()), 20)}"
            )


def _words(seed: int, epoch: int, purpose: int, n: int) -> NDArray[np.uint64]:
    """N random words. Only Philox's words are promised to stay the same between versions, not Generator.permutation."""
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]).random_raw(n)


@lru_cache(maxsize=4)
def _layout(seed: int, epoch: int, n: int, block: int, window_blocks: int) -> tuple[list[tuple[int, ...]], list[int]]:
    """The blocks of each window of an epoch, and the positions where windows start (and the last one ends)."""
    number = -(-n // block)
    blocks = np.argsort(_words(seed, epoch, 0, number), kind="stable")
    windows = np.array_split(blocks, -(-number // window_blocks))  # even: a window of one block would not be mixed
    lengths = [int(np.minimum(block, n - window * block).sum()) for window in windows]
    return [tuple(window.tolist()) for window in windows], [0, *accumulate(lengths)]


@lru_cache(maxsize=8)
def _window(seed: int, epoch: int, window: int, n: int, block: int, blocks: tuple[int, ...]) -> Rows:
    """The rows of a window, shuffled."""
    rows = np.concatenate([np.arange(b * block, min(n, (b + 1) * block)) for b in blocks])
    return rows[np.argsort(_words(seed, epoch, 1 + window, len(rows)), kind="stable")]
