"""Scores of samples: a file that says which of them to keep.

One Parquet file: `key`, `row` and `score` of each sample, the best first, and which samples they are: the content hash
of their manifest. What scores them writes it (`evaluation.forgetting`), `scores:` of a stream reads it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from workloads.data.columns import Manifest, Rows
from workloads.data.shards import DataError, unreadable
from workloads.data.sources import read_file

FACTS = b"manta_scores"


def write_scores(path: Path, manifest: Manifest, scores: NDArray[np.float32], how: Mapping[str, Any]) -> None:
    """Replaces `path`; equal scores keep the order of the set.

    Args:
        path: its folder is made.
        manifest: the samples.
        scores: [N], of each; more is better.
        how: they were made, as JSON values.
    """
    assert len(scores) == len(manifest)
    rows = np.argsort(-scores, kind="stable")
    facts = {"content_hash": manifest.content_hash, "samples": len(manifest), "how": dict(how)}
    table = pa.table({"key": [manifest.keys[int(row)] for row in rows], "row": rows, "score": scores[rows]})
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.tmp")
    pq.write_table(table.replace_schema_metadata({FACTS: json.dumps(facts)}), scratch, compression="zstd")
    scratch.replace(path)


def expect_scores(path: str) -> None:
    """Refuses what is no file of scores, without knowing the samples.

    Raises:
        DataError: it is none.
    """
    _open(path)


def best(path: str, manifest: Manifest, share: float) -> Rows:
    """Rows of the best `share` of the samples, one at least, in the order of the set.

    Args:
        path: a file of `write_scores`, local or remote.
        manifest: the samples that it must be of.
        share: above 0, up to 1.

    Raises:
        DataError: no file of scores, or one of other samples.
    """
    file, facts = _open(path)
    if facts["content_hash"] != manifest.content_hash:
        raise DataError(
            f"got scores {path} of {facts['samples']} samples with content {facts['content_hash'][:12]}, expected "
            f"those of these shards: {len(manifest)} samples with content {manifest.content_hash[:12]}; score these "
            "shards, or name the ones that were scored"
        )
    rows: Rows = file.read(["row"])["row"].to_numpy()
    return np.sort(rows[: max(1, round(share * len(manifest)))])


def _open(path: str) -> tuple[pq.ParquetFile, dict[str, Any]]:
    try:
        data = read_file(path)
    except OSError as error:
        raise unreadable(path, error, "scores") from error
    if data is None:
        raise DataError(f"got no file {path}, expected scores there; check the path")
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        facts: dict[str, Any] = json.loads(file.schema_arrow.metadata[FACTS])
    except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
        raise DataError(
            f"got {path}, which holds no scores ({error!r}), expected what an evaluation such as `forgetting` wrote; "
            "name its scores.parquet"
        ) from error
    return file, facts
