"""Reading many small pieces of few large files: sorted, neighbours merged, never a whole shard."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from workloads.data.manifest import DataError, Manifest

MAX_GAP_BYTES = 4096  # reading over the headers and the label between two images is cheaper than another call
MAX_RUN_BYTES = 4 << 20


def read_images(manifest: Manifest, rows: NDArray[np.int64]) -> list[bytes]:
    """The encoded images of `rows`, in their order.

    Shards are opened for the call only: no handle to keep, to fork or to pickle, and one that
    vanished or was replaced is noticed at once. Opening costs 5 us on a local disk.

    Raises:
        DataError: a shard vanished, or is not of the size that the manifest says.
    """
    images = [b""] * len(rows)
    shard, offset, length = manifest.shard[rows], manifest.image_offset[rows], manifest.image_length[rows]
    order = np.lexsort((offset, shard))
    bounds = np.flatnonzero(np.diff(shard[order])) + 1
    for places in np.split(order, bounds) if len(order) else []:
        number = int(shard[places[0]])
        file = _open(manifest.shards[number], manifest.shard_bytes[number])
        try:
            for run in _runs(places, offset, length):
                start, end = int(offset[run[0]]), int(max(offset[run] + length[run]))
                data = _read(file, start, end - start, manifest.shards[number])
                for place in run:
                    at = int(offset[place]) - start
                    images[place] = data[at : at + int(length[place])]
        finally:
            os.close(file)
    return images


def _runs(places: NDArray[np.int64], offset: NDArray[np.int64], length: NDArray[np.int64]) -> list[NDArray[np.int64]]:
    """Splits places, sorted by offset, into runs that are read at once."""
    starts, ends = offset[places], offset[places] + length[places]
    apart = np.flatnonzero(starts[1:] - ends[:-1] > MAX_GAP_BYTES) + 1
    runs = []
    for run in np.split(places, apart):
        chunk = (offset[run] - offset[run[0]]) // MAX_RUN_BYTES
        runs += np.split(run, np.flatnonzero(np.diff(chunk)) + 1)
    return runs


def _open(path: str, expected_bytes: int) -> int:
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise DataError(f"got {error.strerror} for {path}, expected a shard there; bring it back") from error
    if (got := os.fstat(file).st_size) != expected_bytes:
        os.close(file)
        raise DataError(
            f"got {path} of {got} bytes, expected {expected_bytes} by the manifest: it changed; "
            f"bring it back, or run `manta inspect --rebuild` and start again"
        )
    return file


def _read(file: int, offset: int, size: int, path: str) -> bytes:
    pieces = []
    while size:
        try:
            piece = os.pread(file, size, offset)
        except OSError as error:
            raise DataError(f"got {error.strerror} in {Path(path)} at offset {offset}; check the disk") from error
        if not piece:
            raise DataError(f"got the end of {path} at offset {offset}, expected {size} more bytes; bring it back")
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
