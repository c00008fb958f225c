"""In which order a set is visited: every sample once an epoch, another order each epoch, mixed over the whole set.

Blocks of neighbouring samples are permuted over the whole set, a window of some blocks is
shuffled sample by sample. So reads stay near each other, and a set that is sorted by class
comes out mixed. Only the blocks are permuted as a whole; samples are permuted when their
window is reached, so the cost to start anywhere does not grow with the set.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from workloads.data.shards import DataError

Rows = NDArray[np.int64]

BLOCK = 64  # neighbouring samples that stay in one window, so that reads stay near each other
WINDOW = 16384  # samples: the blocks of a window come from 256 places of the set


class Sampler(Protocol):
    """Which rows the global batches of an epoch hold: a pure function of (epoch, position)."""

    steps_per_epoch: int

    def batch(self, epoch: int, position: int) -> Rows:
        """The rows of one global batch; a rank takes a contiguous share of it."""

    def alike(self, row: int) -> Rows | None:
        """Rows that may stand in for one that cannot be decoded; None: any of the set."""


class Uniform:
    """Every sample once an epoch.

    Attributes:
        steps_per_epoch: global batches in an epoch.
    """

    def __init__(
        self,
        n: int,
        batch_size: int,
        *,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        window: int = WINDOW,
    ) -> None:
        """An order of n samples.

        Args:
            n: samples.
            batch_size: global, over all ranks.
            seed: of the order.
            shuffle: False gives the order of the manifest.
            drop_last: leave out what does not fill a batch; else the last batch of an epoch is shorter.
            window: about how many samples are mixed one by one; more is nearer to a uniform shuffle.

        Raises:
            DataError: not even one batch fits.
        """
        if n < (batch_size if drop_last else 1):
            raise DataError(
                f"got batch_size={batch_size} for {n} samples, expected at most as many; "
                f"use batch_size={n} or less, or more samples"
            )
        self.n, self.batch_size, self.seed, self.shuffle = n, batch_size, seed, shuffle
        self.steps_per_epoch = n // batch_size if drop_last else -(-n // batch_size)
        self._window_blocks = max(1, window // BLOCK)

    def batch(self, epoch: int, position: int) -> Rows:
        start = position * self.batch_size
        return self.rows(epoch, start, min(start + self.batch_size, self.n))

    def alike(self, row: int) -> None:
        return None

    def rows(self, epoch: int, start: int, stop: int) -> Rows:
        """Positions start..stop-1 of the order of an epoch: int64 [stop - start]."""
        if not self.shuffle:
            return np.arange(start, stop)
        layout = self.seed, epoch, self.n, self._window_blocks
        _, _, starts = _layout(*layout)
        first = int(np.searchsorted(starts, start, side="right")) - 1
        last = int(np.searchsorted(starts, stop, side="left"))
        rows: Rows = np.concatenate([np.empty(0, np.int64), *(_window(*layout, w) for w in range(first, last))])
        return rows[start - starts[first] : stop - starts[first]]


def words(seed: int, epoch: int, purpose: int, n: int) -> NDArray[np.uint64]:
    """N random words. Only Philox's words are promised to stay the same between versions, not Generator.permutation."""
    return np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, purpose]).random_raw(n)


def permutation(seed: int, epoch: int, purpose: int, n: int) -> Rows:
    """A random order of 0..n-1."""
    return np.argsort(words(seed, epoch, purpose, n), kind="stable")


@lru_cache(maxsize=4)
def _layout(seed: int, epoch: int, n: int, window_blocks: int) -> tuple[Rows, Rows, Rows]:
    """All blocks of an epoch in their order, and where windows start (and the last ends): among blocks, among samples.

    Windows are of even size: one of a single block would not be mixed.
    """
    number = -(-n // BLOCK)
    windows = -(-number // window_blocks)
    first_blocks = np.arange(windows + 1) * number // windows
    blocks = permutation(seed, epoch, 0, number)
    short = int(np.flatnonzero(blocks == number - 1)[0])  # where the last block went, which may not be full
    starts = first_blocks * BLOCK
    starts[first_blocks > short] -= number * BLOCK - n
    return blocks, first_blocks, starts


@lru_cache(maxsize=8)
def _window(seed: int, epoch: int, n: int, window_blocks: int, window: int) -> Rows:
    """The rows of a window, shuffled."""
    blocks, first_blocks, _ = _layout(seed, epoch, n, window_blocks)
    rows = (blocks[first_blocks[window] : first_blocks[window + 1], None] * BLOCK + np.arange(BLOCK)).ravel()
    rows = rows[rows < n]
    shuffled: Rows = rows[permutation(seed, epoch, 1 + window, len(rows))]
    return shuffled
