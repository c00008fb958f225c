"""Shards of another size or order, with smaller images if wanted: what training reads faster."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import simplejpeg
from PIL import Image

from workloads.data.decode import decode
from workloads.data.order import permutation
from workloads.data.sample_index import index_samples
from workloads.data.shard_writer import Members, OnSample, Packed, ShardLimit, Source, Split, nobody, write_dataset
from workloads.data.shards import DataError
from workloads.data.tarscan import IMAGE_SUFFIXES

QUALITY = 90
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 2**10, "mi": 2**20, "gi": 2**30}


def reshard(
    shards: str | list[str],
    out: Path,
    *,
    limit: ShardLimit,
    shuffle: int | None = None,
    resize_short_side: int | None = None,
    quality: int = QUALITY,
    prefix_keys: bool = False,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """All samples of some shards in new ones, `shard-000000.tar`, ...; the members of a sample stay together.

    Args:
        shards: what `expand` takes.
        out: the new folder.
        limit: of a new shard, in samples or bytes.
        shuffle: a seed that draws their order over all shards; None keeps the order.
        resize_short_side: in pixels; images whose short side is longer become JPEG files of this short side.
        quality: of these, 1 to 100.
        prefix_keys: put the shard's name before each key, for shards that number their samples alike.
        force: replace `out`, if it holds nothing but packed shards.
        on_sample: told the name of each sample when it is done.

    Raises:
        DataError: no usable sample, keys in more than one shard, masks or boxes that a resized image would not fit, or
            an `out` that may not be replaced.
    """
    if resize_short_side is not None and (resize_short_side < 1 or not 1 <= quality <= 100):
        raise DataError(
            f"got a short side of {resize_short_side} px and quality {quality}, expected 1 or more and 1 to 100"
        )
    index = index_samples(shards, prefix_keys=prefix_keys)
    order = np.arange(len(index))
    if shuffle is not None:
        order = permutation(shuffle, 0, 0, len(index))

    def source(row: int) -> Source:
        whole = index.source(row)
        if resize_short_side is None:
            return whole
        return replace(whole, read=lambda: _resized(whole, resize_short_side, quality))

    return write_dataset(
        {_common_name(index.shards): Split(len(order), lambda start: (source(int(row)) for row in order[start:]))},
        index.classes,
        out,
        limit=limit,
        arguments={
            "command": "reshard",
            **index.arguments(),
            "samples_per_shard": limit.samples,
            "bytes_per_shard": limit.bytes,
            "shuffle": shuffle,
            "resize_short_side": resize_short_side,
            "quality": quality,
            "prefix_keys": prefix_keys,
        },
        force=force,
        on_sample=on_sample,
        bad=index.bad,
    )


def parse_bytes(text: str) -> int:
    """`500MB`, `1GiB`, `1000000` -> bytes.

    Raises:
        DataError: it is no size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]i?)?b?", text.strip().lower())
    if match is None:
        raise DataError(f"got the size {text!r}, expected one such as 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2] or ""])


def _common_name(shards: list[str]) -> str:
    """`train` of train-000000.tar, train-000001.tar."""
    names = {re.sub(r"[-_.]?\d*$", "", Path(shard).stem) for shard in shards}
    return names.pop() or "shard" if len(names) == 1 else "shard"


def _resized(source: Source, short_side: int, quality: int) -> Members:
    """The members of a sample, its image made smaller if it is larger."""
    members = source.read()
    image = next((suffix for suffix in members if suffix in IMAGE_SUFFIXES), None)
    if image is None:
        return members
    pixels = decode(members[image])
    height, width = pixels.shape[:2]
    shrink = short_side / min(height, width)
    if shrink >= 1:
        return members
    others = {suffix: data for suffix, data in members.items() if suffix != image}
    if bound := [suffix for suffix, data in others.items() if _is_bound_to_pixels(suffix, data)]:
        raise DataError(
            f"got {', '.join(bound)} beside the image of {source.name}, expected nothing that a smaller image does not "
            "fit; leave out --resize-short-side"
        )
    size = (max(1, round(width * shrink)), max(1, round(height * shrink)))
    small = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    return {"jpg": simplejpeg.encode_jpeg(small, quality, "RGB", "420"), **others}


def _is_bound_to_pixels(suffix: str, data: bytes) -> bool:
    """Masks, second images, arrays; of JSON what holds boxes, since most of it says other things."""
    kind = suffix.rsplit(".", 1)[-1]
    return kind in (*IMAGE_SUFFIXES, "npy", "npz", "gz") or (kind == "json" and b'"boxes"' in data)
