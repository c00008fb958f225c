"""What is wrong with a set of shards, all of it, before a job meets it."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np

from workloads.data.decode import ImageError
from workloads.data.manifest import Manifest, build_manifest
from workloads.data.member_checks import Check, check_of
from workloads.data.ranged import read_members
from workloads.data.sample_index import repeated
from workloads.data.shard_writer import OnSample, nobody

MAX_CHUNK, CHUNK_BYTES = 256, 64 << 20  # samples that are in memory at a time


@dataclass(frozen=True)
class Findings:
    """What was looked at, and "file: member at offset N: why" of all that is wrong."""

    samples: int
    shards: int
    findings: list[str]


def validate(
    shards: str | list[str],
    *,
    decode: bool = False,
    on_shard: OnSample = nobody,
    on_sample: OnSample = nobody,
) -> Findings:
    """Scans all shards anew, whatever manifest is kept; nothing is written.

    Finds what the scan sets aside (torn archives, paths that climb out, links, labels that are no class of classes.txt,
    samples without their image), keys that more than one shard has, and with `decode` what cannot be decoded.

    Args:
        shards: what `expand` takes.
        decode: also decode every image, mask, array, video and volume.
        on_shard: told each path when it is scanned.
        on_sample: told the key of each sample when it is decoded.

    Raises:
        DataError: a shard cannot be read, or no sample can be used.
    """
    manifest = build_manifest(shards, on_shard)
    keys = np.array(list(manifest.keys), np.dtypes.StringDType())
    findings = [*manifest.quarantined]
    findings += [f"{manifest.where(int(row))}: duplicate key, it is in a shard before" for row in repeated(keys)]
    if decode:
        findings += undecodable(manifest, on_sample)
    return Findings(len(manifest), len(manifest.shards), findings)


def undecodable(manifest: Manifest, on_sample: OnSample = nobody) -> list[str]:
    """`file: member at offset N: why` of everything that cannot be decoded, kind by kind.

    Raises:
        DataError: a decoder is not installed, or a shard vanished.
    """
    chunk = max(1, min(MAX_CHUNK, CHUNK_BYTES // max(1, manifest.mean_bytes)))
    bad: list[str] = []
    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        for member, places in manifest.members.items():
            if (check := check_of(member)) is None:
                continue
            rows = np.flatnonzero(places.offset >= 0)
            for start in range(0, len(rows), chunk):
                some_rows = rows[start : start + chunk]
                whys = pool.map(partial(_why, check), read_members(manifest, member, some_rows))
                for row, why in zip(some_rows.tolist(), whys, strict=True):
                    bad += [f"{manifest.where(row, member)}: {why}"] if why else []
                    if member == manifest.primary:
                        on_sample(manifest.keys[row])
    return bad


def _why(check: Check, data: bytes) -> str:
    """Why it cannot be decoded, "" if it can."""
    try:
        check(data)
    except ImageError as error:
        return str(error)
    return ""
