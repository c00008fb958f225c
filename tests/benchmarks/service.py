"""The service from outside: acceptance, start of a job, prediction, each against what it cannot beat."""

from __future__ import annotations

import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from cluster.embedded import Head
from service.client import Client

POSTS = 30
STARTS = 7
REQUESTS = 200
CLIENTS = 32


def _spec(shards: str, **changes: Any) -> dict[str, Any]:
    model = {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 96, "depth": 3, "heads": 4}
    spec = {
        "name": "bench",
        "method": {"name": "fine_tune", "view": {"flip": 0}},
        "model": model,
        "data": {"train": {"shards": shards}},
        "steps": 1,
        "batch_size": 32,
    }
    return spec | changes


def _settled(client: Client) -> None:
    while any(job["state"] not in ("SUCCEEDED", "FAILED", "CANCELLED") for job in client.jobs(limit=500)):
        time.sleep(0.2)


def post_ms(client: Client, shards: str, *, burst: bool) -> list[float]:
    """Milliseconds from POST to the 201, whose row is on disk.

    Args:
        client: of the service.
        shards: of the jobs, which are cancelled at once.
        burst: whether the next one comes while those before are still being started and stopped, which takes both
            cores; else the service has nothing else to do.
    """
    took = []
    for _ in range(POSTS):
        began = time.perf_counter()
        job = client.submit(_spec(shards))
        took.append(1e3 * (time.perf_counter() - began))
        client.cancel(job["id"])
        if not burst:
            _settled(client)
    _settled(client)
    return took


def starts(client: Client, head: Head, shards: str, folder: Path) -> list[tuple[float, float]]:
    """Seconds of a start of ours and of a bare one, in turns: the machine's mood hits both.

    Ours is from POST to the checkpoint of the first step of a one-step job on one CPU worker, the bare one from
    `ray job submit` to the line after `import torch` of its script.
    """
    from ray.job_submission import JobSubmissionClient

    jobs, took = JobSubmissionClient(head.dashboard_url), []
    for i in range(STARTS):
        began = time.time()
        job = client.submit(_spec(shards))
        client.wait(job["id"], poll_s=1.0)  # seldom: it takes from the job
        ours = (head.home / "runs" / job["id"] / "checkpoints" / "step-00000001.pt").stat().st_mtime - began
        stamp = folder / f"stamp-{i}"
        script = f"import torch, time, pathlib; pathlib.Path({str(stamp)!r}).write_text(str(time.time()))"
        began = time.time()
        bare = jobs.submit_job(entrypoint=f'{sys.executable} -c "{script}"')
        while not jobs.get_job_status(bare).is_terminal():
            time.sleep(1.0)
        took.append((ours, float(stamp.read_text()) - began))
    return took


def prediction(client: Client, head: Head, shards: str, image: bytes) -> dict[str, float]:
    """Latency of one client over the bare model call, and throughput of 1 and of many clients."""
    import torch

    from workloads.inference import Model

    torch.set_num_threads(1)  # as the replica has
    job = client.wait(client.submit(_spec(shards, steps=20, register="bench"))["id"])
    assert job["state"] == "SUCCEEDED", job["reason"]
    client.deploy("bench", wait_s=120)
    model = Model(head.home / "registry" / "bench" / "1")
    bare, served = [], []
    for _ in range(REQUESTS):
        began = time.perf_counter()
        model.predict([image])
        bare.append(1e3 * (time.perf_counter() - began))
        began = time.perf_counter()
        client.predict("bench", [image])
        served.append(1e3 * (time.perf_counter() - began))

    def ask(n: int) -> None:
        with Client(head.url) as own:
            for _ in range(n):
                own.predict("bench", [image])

    rates = {}
    for clients in (1, CLIENTS):
        each = max(10, REQUESTS // clients)
        with ThreadPoolExecutor(clients) as pool:
            began = time.perf_counter()
            list(pool.map(ask, [each] * clients))
            rates[clients] = clients * each / (time.perf_counter() - began)
    client.undeploy("bench")
    return {
        "bare_ms": statistics.median(bare),
        "served_ms": statistics.median(served),
        "overhead_ms": statistics.median(served) - statistics.median(bare),
        "rps_1": rates[1],
        f"rps_{CLIENTS}": rates[CLIENTS],
    }
