"""The data plane against what a user would pick instead, and against the bare decoder; images per CPU-second.

The peer is webdataset + Pillow + torchvision's transforms in a torch DataLoader, the bound a loop that decodes by
simplejpeg and cuts and resizes by torch, with no order, no labels, no batch. Each is measured in turn in one process,
by its own CPU time, so that another program on the machine costs nobody his figure. At 32 px FFCV is the peer to come
near to: in a measurement of its own it read JPEG at 1.29 times the rate of a bare loop (28,700 to 22,200), so within
1.6 times of it means at least 0.81 of the bare loop.
"""

from __future__ import annotations

import io
import os
import resource
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import apart

ROUNDS = 15
ROWS = 1_000_000


def real(name: str) -> str | None:
    folder = Path(os.environ.get("MANTA_TEST_DATA", Path(__file__).parents[3] / "shared" / "data")) / name
    return f"{folder}/train-*.tar" if folder.is_dir() else None


def generated(folder: Path, width: int, height: int, images: int) -> str:
    """Shards of smooth random JPEGs, for where there are no real ones."""
    from PIL import Image

    rng = np.random.default_rng(0)
    folder.mkdir()
    with tarfile.open(folder / "train-0.tar", "w") as tar:
        for i in range(images):
            small = rng.integers(0, 256, (12, 16, 3), np.uint8)
            file = io.BytesIO()
            Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
            for name, data in ((f"{i:06d}.jpg", file.getvalue()), (f"{i:06d}.cls", str(i % 10).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return f"{folder}/train-*.tar"


def rate(batches: Callable[[], Any], images: int) -> float:
    """Images per CPU-second of this process."""
    began = time.process_time()
    batches()
    return images / (time.process_time() - began)


def rates(shards: str, size: int, batch_size: int, images: int) -> dict[str, list[float]]:
    """`ours`, `peer` and `bare` of each round."""
    import glob  # noqa: I001 - torchvision comes after what repairs it

    import simplejpeg
    import torch
    import webdataset
    from torch.nn import functional as F

    from workloads.data.allocator import keep_freed_memory
    from workloads.data.manifest import open_manifest
    from workloads.data.ranged import read_members
    from workloads.data.reader import Reader
    from workloads.data.transforms.image import draw
    from workloads.data.views import View
    from workloads.models.timm_import import timm  # noqa: F401 - repairs a torchvision that does not fit its torch
    from torchvision import transforms

    torch.set_num_threads(1)
    keep_freed_memory()
    manifest = open_manifest(shards)
    images = min(images, len(manifest)) // batch_size * batch_size
    view = View(size=size, crop_scale=(0.08, 1), flip=0.5)
    reader = Reader(manifest, {"image": view}, batch_size=batch_size)

    def ours() -> None:
        for step in range(images // batch_size):
            reader.batch(step)

    policy = transforms.Compose(
        [transforms.RandomResizedCrop(size), transforms.RandomHorizontalFlip(), transforms.PILToTensor()]
    )
    stream = (
        webdataset.WebDataset(sorted(glob.glob(shards)), shardshuffle=False, empty_check=False)  # noqa: PTH207
        .shuffle(1000)
        .decode("pil")
        .to_tuple("jpg", "cls")
        .map_tuple(policy, lambda label: label)
    )

    def peer() -> None:
        seen = 0
        for pixels, _ in torch.utils.data.DataLoader(stream, batch_size=batch_size, num_workers=0):
            seen += len(pixels)
            if seen >= images:
                return

    rows = np.arange(images)
    encoded = read_members(manifest, "image", rows)
    sizes = torch.tensor([simplejpeg.decode_jpeg_header(data)[1::-1] for data in encoded])
    crops = draw(view, sizes, torch.from_numpy(rows)).crop.tolist()

    def bare() -> None:
        for data, (x, y, w, h) in zip(encoded, crops, strict=True):
            cut = np.ascontiguousarray(simplejpeg.decode_jpeg(data, "RGB")[y : y + h, x : x + w])
            F.interpolate(
                torch.from_numpy(cut).permute(2, 0, 1)[None], size=(size, size), mode="bilinear", antialias=True
            )

    found: dict[str, list[float]] = {"ours": [], "peer": [], "bare": []}
    for call in (ours, bare):
        call()  # warm
    for _ in range(ROUNDS):
        for name, call in (("ours", ours), ("peer", peer), ("bare", bare)):
            found[name].append(rate(call, images))
    return found


def large_manifest(shards: str, path: Path, rows: int) -> None:
    """The samples of some shards, repeated until there are so many."""
    from dataclasses import replace

    from workloads.data.columns import Keys, Places
    from workloads.data.manifest import open_manifest

    small = open_manifest(shards)
    pick = np.arange(rows) % len(small)
    members = {name: Places(offset[pick], length[pick]) for name, (offset, length) in small.members.items()}
    total = int(members[small.primary].length.sum())
    digits = np.char.zfill(np.arange(rows).astype("S9"), 9)
    keys = Keys(np.arange(1, rows + 1) * 9, np.frombuffer(digits.tobytes(), np.uint8))
    replace(
        small,
        keys=keys,
        shard=small.shard[pick],
        label=small.label[pick],
        members=members,
        total_bytes=total,
        content_hash=f"{small.content_hash}-{rows}",
    ).write(path)


def large(path: Path, batches: int) -> dict[str, float]:
    """In a process of its own: seconds to the first batch of a manifest, microseconds of a lookup, MiB held after."""
    code = (
        "import resource, sys, time; began = time.perf_counter()\n"
        "from pathlib import Path; import numpy as np\n"
        "from workloads.data.columns import Manifest; from workloads.data.reader import Reader\n"
        "from workloads.data.views import View\n"
        "from tests.benchmarks.data import anonymous_mib\n"
        "imported, before = time.perf_counter(), anonymous_mib()\n"
        f"manifest = Manifest.read(Path({str(path)!r}))\n"
        "reader = Reader(manifest, {'image': View(size=32)}, batch_size=256)\n"
        "reader.batch(0); first = time.perf_counter()\n"
        f"for step in np.linspace(0, reader.steps_per_epoch - 1, {batches}).astype(int): reader.rows(int(step))\n"
        "looked = time.perf_counter()\n"
        f"print(first - imported, 1e6 * (looked - first) / {batches} / 256, anonymous_mib() - before, first - began)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return dict(zip(("first_batch_s", "row_us", "held_mib", "with_imports_s"), map(float, out), strict=True))


def anonymous_mib() -> float:
    """Memory of this process that is no page of a file."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["RssAnon"].split()[0]) / 1024


def growth_mib(shards: str, epochs: int = 10) -> float:
    """How much more memory this process holds at most after the last epoch than after the second."""
    from workloads.data.manifest import open_manifest
    from workloads.data.reader import Reader
    from workloads.data.views import View

    reader = Reader(open_manifest(shards), {"image": View(size=32)}, batch_size=250)
    peak = 0
    for epoch in range(epochs):
        for batch in reader.batches(epoch * reader.steps_per_epoch, (epoch + 1) * reader.steps_per_epoch):
            del batch
        if epoch == 1:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) / 1024


def rows(folder: Path) -> list[tuple[str, str, str, bool]]:
    """(what, measured, wanted, reached)."""
    small = real("cifar10") or generated(folder / "small", 32, 32, 4000)
    photos = real("photos") or generated(folder / "photos", 500, 375, 600)
    table: list[tuple[str, str, str, bool]] = []
    for what, found, of_peer, of_bare in (
        ("JPEG to crop 224", rates(photos, 224, 64, 640), 2.0, 0.75),
        ("32 px", rates(small, 32, 256, 5120), 10.0, 0.81),
    ):
        for name, against, wanted in (
            ("peer", "webdataset + Pillow + torchvision", of_peer),
            ("bare", "bare simplejpeg and resize", of_bare),
        ):
            ratio = apart.ratio(found["ours"], found[name])
            ours, other = (statistics.median(found[who]) for who in ("ours", name))
            table.append(
                (
                    f"data: {what}, images per CPU-second, ours / {against}",
                    f"{ratio:.2f} ({ours:.0f} / {other:.0f})",
                    f">= {wanted:g}",
                    ratio >= wanted,
                )
            )
    for n in (ROWS, 10 * ROWS):
        path = folder / f"{n}.manifest.parquet"
        large_manifest(small, path, n)
        cold, warm = large(path, 200), large(path, 200)
        table.append(
            (
                f"data: {n:,} samples: first batch, unpacked before / for the first time; place of a row; memory held",
                f"{warm['first_batch_s']:.2f} s / {cold['first_batch_s']:.2f} s; {warm['row_us']:.2f} us; "
                f"{warm['held_mib']:.0f} MiB",
                "< 2 s at 1,000,000",
                warm["first_batch_s"] < 2,
            )
        )
    grown = growth_mib(small)
    table.append(("data: memory grown from the 2nd to the 10th epoch", f"{grown:.1f} MiB", "< 5 MiB", grown < 5))
    return table
