"""`make bench`: every figure in one run, as ratios and medians, into RESULTS.md beside this file."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import tarfile
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from service.client import Client
from service.local_cluster import temporary
from tests.benchmarks import apart, contrast, data, engine, gpu, loop, masked, search, service, service_load
from tests.benchmarks.table import Row, markdown
from workloads.data.pack import pack_digits

TRAIN = "digits/train-{000000..000001}.tar"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "timm"))
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, {versions}"


def rows(folder: Path) -> list[Row]:
    """(what, measured, wanted, reached)."""
    pack_digits(folder / "digits")
    shards = str(folder / TRAIN)
    with tarfile.open(folder / "digits" / "test-000000.tar") as tar:
        member = next(m for m in tar if m.name.endswith(".png"))
        file = tar.extractfile(member)
        assert file is not None
        image = file.read()
    with temporary(folder / "home") as head, Client(head.url) as client:
        alone, burst = (statistics.median(service.post_ms(client, shards, burst=burst)) for burst in (False, True))
        ours, bare = map(list, zip(*service.starts(client, head, shards, folder), strict=True))
        p = service.prediction(client, head, shards, image)
    found = apart.run(loop.under_ray_train, shards=shards, folder=str(folder / "loop"))
    ratio, longer = apart.ratio(found["ours"], found["bare"]), apart.ratio(ours, bare)
    gain = p[f"rps_{service.CLIENTS}"] / p["rps_1"]
    return [
        ("loop: steps/s under Ray Train / bare PyTorch loop", f"{ratio:.3f}", ">= 0.97", ratio >= 0.97),
        ("POST /v1/jobs to the durable 201, nothing else to do, median", f"{alone:.1f} ms", "< 50 ms", alone < 50),
        ("POST /v1/jobs, while 30 other jobs are started and stopped", f"{burst:.1f} ms", "", None),
        (
            "POST to the first training step / `ray job submit` to the line after `import torch`",
            f"{longer:.2f} ({statistics.median(ours):.1f} s / {statistics.median(bare):.1f} s)",
            "<= 1.5",
            longer <= 1.5,
        ),
        (
            "predict, one client: service over bare model call, median",
            f"{p['overhead_ms']:.1f} ms ({p['served_ms']:.1f} - {p['bare_ms']:.1f})",
            "< 15 ms",
            p["overhead_ms"] < 15,
        ),
        (
            f"predict: throughput of {service.CLIENTS} clients / of 1",
            f"{gain:.2f} ({p[f'rps_{service.CLIENTS}']:.0f} / {p['rps_1']:.0f} requests/s)",
            "> 1",
            gain > 1,
        ),
    ]


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        folder = Path(name)
        groups: list[Callable[[], list[Row]]] = [
            partial(rows, folder),
            partial(service_load.rows, folder, str(folder / TRAIN)),
            partial(engine.rows, folder, str(folder / TRAIN)),
            masked.rows,
            contrast.rows,
            partial(data.rows, folder),
            partial(search.rows, folder),
            gpu.rows,
        ]
        measured: list[Row] = []
        for group in groups:
            measured += group()
            print("\n".join(markdown(row) for row in measured), flush=True)  # a later one may fail
    lines = ["# Benchmarks", "", "`make bench` writes this page: one run, medians.", "", machine() + ".", ""]
    lines += [
        f"Measured {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.",
        "",
        "| figure | measured | wanted | |",
        "| --- | --- | --- | --- |",
    ]
    lines += [markdown(row) for row in measured]
    text = "\n".join(lines) + "\n"
    (Path(__file__).parent / "RESULTS.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
