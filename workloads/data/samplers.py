"""Batches that are not a plain shuffle: identities, episodes, domains, weights.

A method says as data which one it wants; `over` binds it to the labels of a set. Each is a pure
function of (seed, epoch, position), so it resumes at any step and is the same for any number of
ranks; each is as exact as its definition allows, which its docstring states.
"""

from __future__ import annotations

import heapq
from functools import lru_cache

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from workloads.data.order import Rows, Sampler, permutation, words
from workloads.data.shards import DataError


class SamplerConfig(BaseModel):
    """What a method wants; holds no code that looks at data before `over` is called."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    def over(self, label: Rows, batch_size: int, seed: int) -> Sampler:
        """Binds to a set.

        Args:
            label: int64 [N]; rows below 0 are left out.
            batch_size: global.
            seed: of everything that is drawn.

        Raises:
            DataError: labels and batch size do not allow it.
        """
        raise NotImplementedError


class PK(SamplerConfig):
    """P identities x K images in each batch, rows of an identity side by side (Hermans et al. 2017, sec. 3).

    In an epoch every image is visited at least once: an identity's images are cut into groups of K, the last one
    filled up with images of the same identity. The identities of a batch differ; the last batches, when too few
    are left, are filled with further groups of other identities.
    """

    k: int = Field(ge=2)

    def over(self, label: Rows, batch_size: int, seed: int) -> Sampler:
        return _PK(self.k, label, batch_size, seed)


class Episodes(SamplerConfig):
    """N-way K-shot episodes with Q queries a class (Vinyals et al. 2016); one or more to a batch.

    Rows of an episode: the classes one after the other, of each its K support images, then its Q queries. Classes of
    an episode differ, as do the images of a class; episodes are drawn independently, so an epoch is a number of
    episodes, not a pass.
    """

    ways: int = Field(ge=2)
    shots: int = Field(ge=1)
    queries: int = Field(ge=1)
    episodes: int = Field(default=100, ge=1)  # of an epoch

    def over(self, label: Rows, batch_size: int, seed: int) -> Sampler:
        return _Episodes(self, label, batch_size, seed)


class Balanced(SamplerConfig):
    """Equally many rows of each domain (a label) in each batch, side by side.

    The largest domain is visited once an epoch (but for what does not fill a batch); smaller ones come round again, in
    another order each time, so that their visits differ by at most one.
    """

    def over(self, label: Rows, batch_size: int, seed: int) -> Sampler:
        return _Balanced(label, batch_size, seed)


class Weighted(SamplerConfig):
    """Rows in proportion to the weight of their class, N in an epoch.

    Systematic sampling: a row of expected count c is visited floor(c) or ceil(c) times, which is as exact as whole
    visits can be. `classes` gives a weight to each class; without, classes come equally often.
    """

    classes: tuple[float, ...] | None = None

    def over(self, label: Rows, batch_size: int, seed: int) -> Sampler:
        return _Weighted(self.classes, label, batch_size, seed)


def _groups(label: Rows) -> list[Rows]:
    """Rows of each label that is there, ascending; rows without one in none."""
    order = np.argsort(label, kind="stable")
    order = order[label[order] >= 0]
    return np.split(order, np.flatnonzero(np.diff(label[order])) + 1) if len(order) else []


class _Labelled:
    def __init__(self, label: Rows, seed: int) -> None:
        self.groups, self.seed, self._label = _groups(label), seed, label
        if not self.groups:
            raise DataError("got no labels, which this sampler needs, expected a KEY.cls for each sample; label some")

    def alike(self, row: int) -> Rows:
        return np.flatnonzero(self._label == self._label[row])


class _PK(_Labelled):
    def __init__(self, k: int, label: Rows, batch_size: int, seed: int) -> None:
        super().__init__(label, seed)
        self.k, self.p = k, batch_size // k
        if batch_size % k or self.p > len(self.groups):
            raise DataError(
                f"got batch_size={batch_size} for k={k} and {len(self.groups)} identities, expected a multiple of k, "
                f"at most {len(self.groups) * k}; use batch_size={max(1, min(self.p, len(self.groups))) * k}"
            )
        self._need = [-(-len(group) // k) for group in self.groups]  # groups of k
        # As many batches as the identities fill; one identity with very many images needs one batch each.
        self.steps_per_epoch = max(-(-sum(self._need) // self.p), max(self._need))
        self._plan = lru_cache(maxsize=2)(self._planned)

    def batch(self, epoch: int, position: int) -> Rows:
        start = position * self.p * self.k
        return self._plan(epoch)[start : start + self.p * self.k]

    def _planned(self, epoch: int) -> Rows:
        """The whole epoch, [steps * P * K]."""
        rounds = [0] * len(self.groups)

        def take(identity: int) -> Rows:
            group = self.groups[identity]
            passed, part = divmod(rounds[identity], self._need[identity])
            rounds[identity] += 1
            order = permutation(self.seed + 1, epoch, (identity << 16) + passed, len(group))
            return group[order[np.arange(part * self.k, (part + 1) * self.k) % len(group)]]

        # The identities with most groups left first, so that none is left over alone; ties at random.
        tie = permutation(self.seed, epoch, 1, len(self.groups)).argsort()
        heap = [(-need, int(tie[i]), i) for i, need in enumerate(self._need)]
        heapq.heapify(heap)
        batches = []
        for _ in range(self.steps_per_epoch):
            chosen = [heapq.heappop(heap) for _ in range(self.p)]
            batches.append(np.concatenate([take(identity) for _, _, identity in chosen]))
            for need, turn, identity in chosen:
                heapq.heappush(heap, (need + 1, turn + len(self.groups), identity))
        order = permutation(self.seed, epoch, 2, len(batches))
        return np.concatenate([batches[i] for i in order])


class _Episodes(_Labelled):
    def __init__(self, config: Episodes, label: Rows, batch_size: int, seed: int) -> None:
        super().__init__(label, seed)
        self.config, each = config, config.shots + config.queries
        self.groups = [group for group in self.groups if len(group) >= each]
        size = config.ways * each
        if len(self.groups) < config.ways:
            raise DataError(
                f"got {len(self.groups)} classes of at least {each} images, expected {config.ways} for an episode; "
                "lower ways, shots or queries"
            )
        if batch_size % size:
            raise DataError(
                f"got batch_size={batch_size}, expected a multiple of an episode's {size} images; "
                f"use {max(1, batch_size // size) * size}"
            )
        self._to_a_batch = batch_size // size
        self.steps_per_epoch = -(-config.episodes // self._to_a_batch)

    def batch(self, epoch: int, position: int) -> Rows:
        first = position * self._to_a_batch
        return np.concatenate([self._episode(epoch, first + i) for i in range(self._to_a_batch)])

    def _episode(self, epoch: int, number: int) -> Rows:
        each = self.config.shots + self.config.queries
        classes = permutation(self.seed, epoch, number << 20, len(self.groups))[: self.config.ways]
        return np.concatenate(
            [
                self.groups[c][permutation(self.seed, epoch, (number << 20) + 1 + way, len(self.groups[c]))[:each]]
                for way, c in enumerate(classes)
            ]
        )


class _Balanced(_Labelled):
    def __init__(self, label: Rows, batch_size: int, seed: int) -> None:
        super().__init__(label, seed)
        domains = len(self.groups)
        if batch_size % domains:
            raise DataError(
                f"got batch_size={batch_size} for {domains} domains, expected a multiple; "
                f"use {max(1, batch_size // domains) * domains}"
            )
        self._share = batch_size // domains
        self.steps_per_epoch = max(map(len, self.groups)) // self._share
        if not self.steps_per_epoch:
            raise DataError(f"got batch_size={batch_size}, expected a share of {self._share} in one domain; lower it")

    def batch(self, epoch: int, position: int) -> Rows:
        first = (epoch * self.steps_per_epoch + position) * self._share
        return np.concatenate([self._cycle(d, np.arange(first, first + self._share)) for d in range(len(self.groups))])

    def _cycle(self, domain: int, places: Rows) -> Rows:
        """The rows at some places of the endless sequence of passes over a domain."""
        group = self.groups[domain]
        passes, places = np.divmod(places, len(group))
        return np.array([group[self._order(int(n), domain)[at]] for n, at in zip(passes, places, strict=True)])

    @lru_cache(maxsize=256)  # noqa: B019 - a reader lives as long as its process
    def _order(self, n: int, domain: int) -> Rows:
        return permutation(self.seed, n, domain, len(self.groups[domain]))


class _Weighted(_Labelled):
    def __init__(self, classes: tuple[float, ...] | None, label: Rows, batch_size: int, seed: int) -> None:
        super().__init__(label, seed)
        counts = np.bincount(label[label >= 0])
        weights = 1 / np.maximum(counts, 1) if classes is None else np.array(classes, float)
        if len(weights) < len(counts) or not np.isfinite(weights).all() or weights.min() < 0 or weights.max() <= 0:
            raise DataError(
                f"got {len(weights)} weights, expected {len(counts)}, none below 0, not all 0; give one each"
            )
        self.batch_size, self.steps_per_epoch = batch_size, int((label >= 0).sum()) // batch_size
        if not self.steps_per_epoch:
            raise DataError(
                f"got batch_size={batch_size} for {counts.sum()} labelled samples, expected at most as many"
            )
        self._ends = np.where(label >= 0, weights[np.maximum(label, 0)], 0).cumsum()
        self._plan = lru_cache(maxsize=2)(self._planned)

    def batch(self, epoch: int, position: int) -> Rows:
        return self._plan(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def _planned(self, epoch: int) -> Rows:
        n = self.steps_per_epoch * self.batch_size
        start = float(words(self.seed, epoch, 0, 1)[0] >> 11) * 2.0**-53
        ticks = (np.arange(n) + start) * (self._ends[-1] / n)
        rows = np.minimum(np.searchsorted(self._ends, ticks, side="right"), len(self._ends) - 1)
        return rows[permutation(self.seed, epoch, 1, n)]
