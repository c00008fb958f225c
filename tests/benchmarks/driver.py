"""`python -m tests.benchmarks.driver`: what the driver of a job takes of the head while its workers train elsewhere.

The real driver on a cluster of this machine, with two workers whose steps are as fast as they come, so that it has at
least as much to do as with larger models. Memory and CPU are those of its process alone.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.benchmarks import apart
from tests.toy import make_job, write_shards
from workloads.record import RunFolder

SETTLE_S, LOOK_S = 15.0, 60.0


@dataclass(frozen=True)
class Driver:
    """Of its process: resident memory, its own share of it, and CPU seconds a second."""

    resident_bytes: int
    own_bytes: int
    cores: float


def measure(folder: Path, settle_s: float = SETTLE_S, look_s: float = LOOK_S) -> Driver:
    """Trains, waits for so long, and looks for so long.

    Raises:
        RuntimeError: the job ended before that.
    """
    folder.mkdir(parents=True, exist_ok=True)
    shards = {"train": write_shards(folder, "train", 80, 3)}
    spec = make_job(shards, epochs=1_000_000, checkpoint={"every_steps": 500}, resources={"workers": 2})
    (folder / "job.json").write_text(spec.model_dump_json())
    with apart.own_cluster(folder / "home"):
        environment = os.environ | {"MANTA_HOME": str(folder / "home"), "MANTA_JOB_ID": "job-driver"}
        run = RunFolder(folder / "home" / "runs" / "job-driver")
        command = [sys.executable, "-m", "workloads.run", str(folder / "job.json")]
        with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as driver:
            try:
                while not run.metrics.exists():
                    if driver.poll() is not None:
                        assert driver.stderr is not None
                        raise RuntimeError(f"the job ended: {driver.stderr.read()[-2000:].decode()}")
                    time.sleep(0.5)
                time.sleep(settle_s)
                process = psutil.Process(driver.pid)
                before, began = process.cpu_times(), time.perf_counter()
                time.sleep(look_s)
                after, took = process.cpu_times(), time.perf_counter() - began
                memory = process.memory_full_info()
            finally:
                driver.terminate()
    cores = (after.user + after.system - before.user - before.system) / took
    return Driver(memory.rss, memory.uss, cores)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    sizes = {"resident_gib": found.resident_bytes / 2**30, "own_gib": found.own_bytes / 2**30, "cores": found.cores}
    print(json.dumps({name: round(value, 3) for name, value in sizes.items()}))


if __name__ == "__main__":
    main()
