"""Reading many small pieces of few large files: sorted, neighbours merged, never a whole shard."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from itertools import groupby

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
    order = np.lexsort((manifest.image_offset[rows], manifest.shard[rows]))
    shard: list[int] = manifest.shard[rows].tolist()
    offset: list[int] = manifest.image_offset[rows].tolist()
    length: list[int] = manifest.image_length[rows].tolist()
    for number, places in groupby(order.tolist(), key=shard.__getitem__):
        path = manifest.shards[number]
        file = _open(path, manifest.shard_bytes[number])
        try:
            for run in _runs(places, offset, length):
                start = offset[run[0]]
                data = _read(file, start, max(offset[place] + length[place] for place in run) - start, path)
                for place in run:
                    at = offset[place] - start
                    images[place] = data[at : at + length[place]]
        finally:
            os.close(file)
    return images


def _runs(places: Iterable[int], offset: list[int], length: list[int]) -> Iterator[list[int]]:
    """Splits places, sorted by offset, into runs that are read at once."""
    run: list[int] = []
    end = 0
    for place in places:
        if run and (offset[place] - end > MAX_GAP_BYTES or end - offset[run[0]] > MAX_RUN_BYTES):
            yield run
            run = []
        run.append(place)
        end = offset[place] + length[place]
    if run:
        yield run


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
            raise DataError(f"got {error.strerror} in {path} at offset {offset}; check the disk") from error
        if not piece:
            raise DataError(f"got the end of {path} at offset {offset}, expected {size} more bytes; bring it back")
        pieces.append(piece)
        offset, size = offset + len(piece), size - len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)
