"""Reading many small pieces of few large files: sorted, neighbours merged, never a whole shard."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from workloads.data.columns import Manifest
from workloads.data.shards import DataError
from workloads.data.sources import CONNECTIONS, Shard, is_remote, open_shard

MAX_GAP_BYTES = 4096  # reading over the headers and the label between two images is cheaper than another call
MAX_REMOTE_GAP_BYTES = 128 << 10  # what a connection brings while the next request is on its way
MAX_RUN_BYTES = 4 << 20


def read_members(manifest: Manifest, member: str, rows: NDArray[np.int64]) -> list[bytes]:
    """One member of each of `rows`, in their order; empty where a sample has none.

    Shards are opened for the call only: no handle to keep, to fork or to pickle, and one that
    vanished or was replaced is noticed at once. Opening costs 5 us on a local disk.

    Raises:
        DataError: a shard vanished, or is not of the size that the manifest says.
    """
    offsets, lengths = manifest.places(member)
    shards = manifest.shard[rows]
    found = [b""] * len(rows)
    offset: list[int] = offsets[rows].tolist()
    length: list[int] = lengths[rows].tolist()
    order = [place for place in np.lexsort((offsets[rows], shards)).tolist() if offset[place] >= 0]
    number: list[int] = shards.tolist()

    def read_shard(places: list[int]) -> None:
        path = manifest.shards[number[places[0]]]
        remote = is_remote(path)
        shard = _open(path, manifest.shard_bytes[number[places[0]]])

        def read_run(run: list[int]) -> None:
            first = run[0]
            start = offset[first]
            size = length[first] if len(run) == 1 else max(offset[i] + length[i] for i in run) - start
            try:
                data = shard.read_at(start, size)
            except OSError as error:
                raise DataError(
                    f"got {error.strerror or error} in {path} at offset {start}; check the storage"
                ) from error
            if len(data) < size:
                end = start + len(data)
                raise DataError(
                    f"got the end of {path} at offset {end}, expected {size - len(data)} more bytes; bring it back"
                )
            if len(run) == 1:
                found[first] = data
            else:
                for place in run:
                    at = offset[place] - start
                    found[place] = data[at : at + length[place]]

        try:
            runs = _runs(places, offset, length, MAX_REMOTE_GAP_BYTES if remote else MAX_GAP_BYTES)
            if remote:
                deque(_requests().map(read_run, runs), maxlen=0)
            else:
                for run in runs:
                    read_run(run)
        finally:
            shard.close()

    for _, places in groupby(order, key=number.__getitem__):
        read_shard(list(places))
    return found


@cache
def _requests() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(CONNECTIONS, thread_name_prefix="request")


def _runs(places: Iterable[int], offset: list[int], length: list[int], gap: int) -> Iterator[list[int]]:
    """Splits places, sorted by offset, into runs that are read at once."""
    run: list[int] = []
    end = 0
    for place in places:
        if run and (offset[place] - end > gap or end - offset[run[0]] > MAX_RUN_BYTES):
            yield run
            run = []
        run.append(place)
        end = offset[place] + length[place]
    if run:
        yield run


def _open(path: str, expected_bytes: int) -> Shard:
    try:
        shard = open_shard(path)
    except OSError as error:
        raise DataError(f"got {error.strerror or error} for {path}, expected a shard there; bring it back") from error
    if shard.size != expected_bytes:
        shard.close()
        raise DataError(
            f"got {path} of {shard.size} bytes, expected {expected_bytes} by the manifest: it changed; "
            f"bring it back, or run `manta inspect --rebuild` and start again"
        )
    return shard
