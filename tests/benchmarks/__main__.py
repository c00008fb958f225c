"""`make bench`: every figure in one run, as ratios and medians, into RESULTS.md beside this file.

python -m tests.benchmarks search load        # these groups only; the others stay on the page with their date
"""

from __future__ import annotations

import argparse
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

HEAD = "# Benchmarks\n\n`make bench` writes this page: medians; each ratio is of one run.\n"
TRAIN = "digits/train-{000000..000001}.tar"


def machine() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("ray", "torch", "timm"))
    return f"{os.cpu_count()} cores ({model}), Python {platform.python_version()}, {versions}"


def rows(folder: Path) -> list[Row]:
    """(what, measured, wanted, reached)."""
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


def groups(folder: Path) -> dict[str, Callable[[], list[Row]]]:
    """What is measured, by the headings of the page."""
    shards = str(folder / TRAIN)
    return {
        "service": partial(rows, folder),
        "load": partial(service_load.rows, folder, shards),
        "engine": partial(engine.rows, folder, shards),
        "masked": masked.rows,
        "contrast": contrast.rows,
        "data": partial(data.rows, folder),
        "search": partial(search.rows, folder),
        "gpu": gpu.rows,
    }


def sections(page: str) -> dict[str, str]:
    """Text below each heading of RESULTS.md, by heading."""
    parts = (part.partition("\n") for part in page.split("\n## ")[1:])
    return {heading: text.strip() for heading, _, text in parts}


def section(measured: list[Row]) -> str:
    """A group, with what it was measured on and when."""
    lines = [f"{machine()}, {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.", ""]
    lines += ["| figure | measured | wanted | |", "| --- | --- | --- | --- |", *map(markdown, measured)]
    return "\n".join(lines)


def main() -> None:
    page = Path(__file__).parent / "RESULTS.md"
    with tempfile.TemporaryDirectory() as name:
        os.environ["XDG_CACHE_HOME"] = name
        folder = Path(name)
        known = groups(folder)
        parser = argparse.ArgumentParser(description="Measures, and writes RESULTS.md.")
        parser.add_argument("group", nargs="*", help=f"one of {', '.join(known)}; default: all")
        wanted = parser.parse_args().group or [*known]
        if unknown := set(wanted) - set(known):
            parser.error(f"got {', '.join(sorted(unknown))}, expected some of {', '.join(known)}")
        pack_digits(folder / "digits")
        for group in wanted:
            found = sections(page.read_text()) | {group: section(known[group]())}  # at once: a later group may fail
            text = "\n".join(f"## {one}\n\n{found[one]}\n" for one in known if one in found)
            page.write_text(f"{HEAD}\n{text}")
            print(found[group], flush=True)


if __name__ == "__main__":
    main()
