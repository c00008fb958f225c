"""Toy scans: two organs in a body, one above the other, that lie a little differently in each volume."""

from __future__ import annotations

import gzip
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
from numpy.typing import NDArray

from workloads.data.shard_writer import Members, ShardLimit, Source, Split, nobody, write_dataset

Scan = tuple[NDArray[np.uint8], NDArray[np.uint8]]


def scan(seed: int) -> Scan:
    """Voxels and classes [D, 16, 16], D of 10 to 14: 1 is the brighter organ, below, 2 the one above."""
    rng = np.random.default_rng(seed)
    shape = (int(rng.integers(10, 15)), 16, 16)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    voxels = np.where(y**2 + x**2 < 0.9, 60.0, 10.0)  # the body
    labels = np.zeros(shape, np.uint8)
    for number, (depth, height, value) in enumerate([(-0.45, 0.2, 170), (0.45, -0.2, 120)], 1):
        middle = np.array([depth, height, 0]) + rng.uniform(-0.12, 0.12, 3)
        radius = rng.uniform(0.4, 0.6, 3)
        organ = sum(((axis - m) / r) ** 2 for axis, m, r in zip((z, y, x), middle, radius, strict=True)) < 1
        voxels[organ], labels[organ] = value, number
    voxels = voxels * rng.uniform(0.8, 1.2) + rng.normal(0, 8, shape)
    return voxels.clip(0, 255).astype(np.uint8), labels


def nifti(voxels: NDArray[np.uint8]) -> bytes:
    """[D, H, W] -> a file whose z, y, x they are."""
    return gzip.compress(nibabel.Nifti1Image(voxels.T, np.diag([1, 1, 3, 1])).to_bytes(), mtime=0)


def write_volumes(folder: Path, splits: dict[str, int], make: Callable[[int], Scan] = scan) -> dict[str, str]:
    """So many scans of `make` in each split of the new `folder`, no two of a seed; their shards by split."""
    seeds = iter(range(sum(splits.values())))

    def source(seed: int) -> Source:
        def read() -> Members:
            voxels, labels = make(seed)
            return {"nii.gz": nifti(voxels), "seg.nii.gz": nifti(labels)}

        return Source(f"scan {seed}", lambda number: f"{number:04d}", read)

    sources = {name: Split.of([source(next(seeds)) for _ in range(n)]) for name, n in splits.items()}
    limit = ShardLimit(samples=1000)
    write_dataset(sources, [], folder, limit=limit, arguments={}, force=False, on_sample=nobody)
    return {name: str(folder / f"{name}-000000.tar") for name in splits}
