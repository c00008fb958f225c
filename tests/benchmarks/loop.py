"""Steady steps/s of the worker loop under Ray Train against a bare PyTorch loop of the same model.

Both run in the same thread of the same Ray Train worker and take turns of a few seconds, so that the machine's mood
hits both: the bare loop has its batches ready in memory, ours reads and augments shards, keeps a curve, watches for a
stop. One torch thread each. What starts a turn is not measured: the caches of the other, the batches read meanwhile.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

from tests.benchmarks import apart

MEASURED = 10  # steps of a turn, one of them with a point of the curve
UNMEASURED = 4  # before them; more than are read ahead
ROUNDS = 14


def spec_of(shards: str, steps: int) -> dict[str, Any]:
    """A ViT of 2.8 M parameters at 64 px, batch 64: a step of about 0.2 s on one core."""
    return {
        "name": "bench-loop",
        "method": {"name": "mae", "decoder_dim": 96, "decoder_depth": 2, "decoder_heads": 4},
        "model": {"name": "vit", "image_size": 64, "patch_size": 8, "dim": 192, "depth": 6, "heads": 6},
        "data": {"train": {"shards": shards}},
        "steps": steps,
        "batch_size": 64,
        "checkpoint": {"every_steps": 10_000},
    }


def measure(shards: str) -> dict[str, list[float]]:
    """Steps/s of each round: `bare` and `ours`, the warm-up left out."""
    import torch

    from workloads import assemble
    from workloads.data.allocator import keep_freed_memory
    from workloads.data.reader import Reader
    from workloads.data.transforms.image import normalise
    from workloads.methods.base import Progress
    from workloads.methods.mae import MAE
    from workloads.record import RunFolder
    from workloads.spec import JobSpec
    from workloads.train import train

    torch.set_num_threads(1)
    keep_freed_memory()  # for both: the ratio is the loop's alone
    spec = JobSpec.model_validate(spec_of(shards, (ROUNDS + 1) * (UNMEASURED + MEASURED)))
    manifest = assemble.open_stream(spec.data["train"])
    views = assemble.views_of(spec)
    reader = Reader(manifest, views, batch_size=spec.batch_size)
    ready = [reader.batch(i) for i in range(4)]
    ready = [batch | {name: normalise(batch[name], view) for name, view in views.items()} for batch in ready]
    method = assemble.build_method(spec, assemble.data_info(spec, manifest), Path())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)

    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    turn, began = UNMEASURED + MEASURED, 0.0

    def bare() -> float:
        start = 0.0
        for step in range(turn):
            if step == UNMEASURED:
                start = time.perf_counter()
            optimizer.zero_grad()
            output = method(ready[step % 4], Progress(step, 0, turn))
            assert output.loss is not None
            output.loss.backward()
            optimizer.step()
        return MEASURED / (time.perf_counter() - start)

    def after_step(self: MAE, progress: Progress) -> None:
        nonlocal began
        inside = (progress.step + 1) % turn
        if inside == UNMEASURED:
            began = time.perf_counter()
        elif inside == 0:
            rates["ours"].append(MEASURED / (time.perf_counter() - began))
            rates["bare"].append(bare())

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(MAE, "after_step", after_step):
        train(spec, RunFolder(Path(folder)), Path())
    return {name: of_all[1:] for name, of_all in rates.items()}  # the first warms up


def under_ray_train(shards: str, folder: str) -> dict[str, list[float]]:
    """`measure` inside one worker of Ray Train, on a cluster of its own.

    Args:
        shards: of images.
        folder: is made.
    """
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    out = Path(folder) / "rates.json"

    def worker(config: dict[str, str]) -> None:
        from tests.benchmarks.loop import measure

        Path(config["out"]).write_text(json.dumps(measure(config["shards"])))

    with apart.own_cluster(Path(folder)):
        DataParallelTrainer(
            worker,
            train_loop_config={"shards": shards, "out": str(out)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="bench", storage_path=folder),
        ).fit()
    rates: dict[str, list[float]] = json.loads(out.read_text())
    return rates
