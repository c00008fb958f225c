"""Steady steps/s of the worker loop under Ray Train against a bare PyTorch loop of the same model.

Both run in the same Ray Train worker, in turn, so that the machine's mood hits both: the
bare loop has its batches ready in memory, ours reads and augments shards, keeps a
curve, watches for a stop. One torch thread each.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

STEPS = 40  # of one segment
ROUNDS = 9


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
    from workloads.ranks import Ranks
    from workloads.record import RunFolder
    from workloads.spec import JobSpec
    from workloads.train import train

    torch.set_num_threads(1)
    keep_freed_memory()  # for both: the ratio is the loop's alone
    spec = JobSpec.model_validate(spec_of(shards, STEPS))
    manifest = assemble.open_stream(spec.data["train"])
    views = assemble.views_of(spec)
    reader = Reader(manifest, views, batch_size=spec.batch_size)
    ready = [reader.batch(i) for i in range(4)]
    ready = [batch | {name: normalise(batch[name], view) for name, view in views.items()} for batch in ready]
    method = assemble.build_method(spec, assemble.data_info(spec, manifest), Path())
    optimizer = torch.optim.AdamW(method.parameters(), lr=1e-4, fused=True)

    def bare() -> float:
        start = 0.0
        for step in range(STEPS):
            if step == STEPS // 6:
                start = time.perf_counter()
            optimizer.zero_grad()
            output = method(ready[step % 4], Progress(step, 0, STEPS))
            assert output.loss is not None
            output.loss.backward()
            optimizer.step()
        return (STEPS - STEPS // 6) / (time.perf_counter() - start)

    def ours() -> float:
        times: list[tuple[int, float]] = []
        with tempfile.TemporaryDirectory() as folder:
            run = RunFolder(Path(folder))
            train(spec, run, Path(), Ranks(), on_point=lambda point: times.append((point["step"], time.perf_counter())))
        (first, began), (last, ended) = times[0], times[-2]  # the last point waits for the final checkpoint
        return (last - first) / (ended - began)

    rates: dict[str, list[float]] = {"bare": [], "ours": []}
    for _ in range(ROUNDS):
        rates["bare"].append(bare())
        rates["ours"].append(ours())
    return rates


def under_ray_train(shards: str) -> dict[str, list[float]]:
    """`measure` inside one worker of Ray Train; needs a connected cluster."""
    from ray.train import RunConfig, ScalingConfig
    from ray.train.v2.api.data_parallel_trainer import DataParallelTrainer

    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"

        def worker(config: dict[str, str]) -> None:
            import json

            from tests.benchmarks.loop import measure

            Path(config["out"]).write_text(json.dumps(measure(config["shards"])))

        DataParallelTrainer(
            worker,
            train_loop_config={"shards": shards, "out": str(out)},
            scaling_config=ScalingConfig(num_workers=1),
            run_config=RunConfig(name="bench", storage_path=folder),
        ).fit()
        import json

        rates: dict[str, list[float]] = json.loads(out.read_text())
        return rates


def ratio(rates: dict[str, list[float]]) -> float:
    return statistics.median(o / b for o, b in zip(rates["ours"], rates["bare"], strict=True))
