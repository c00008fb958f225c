"""The training engine against bare PyTorch: the loop, two workers, dropped tokens, checkpoints.

Each figure is taken in processes of its own, of one torch thread each. What is compared takes turns there, so that the
mood of the machine meets both.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from tests.benchmarks import apart, growth, loop, masked, synthetic, workers
from tests.benchmarks.table import Row
from workloads.methods.base import Batch, Method, Output, Progress
from workloads.methods.mae import MAE
from workloads.parts.masking import Mask
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_training import CheckpointPolicy

STALL = {  # 20 million parameters
    "name": "bench-stall",
    "method": {"name": "mae", "decoder_dim": 96, "decoder_depth": 1, "decoder_heads": 4},
    "model": {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 384, "depth": 11, "heads": 6},
    "batch_size": 32,
}
MASKING = {  # wide enough for matrix products to be most of the work
    "name": "bench-masking",
    "method": {"name": "mae", "decoder_dim": 192, "decoder_depth": 1, "decoder_heads": 4},
    "model": {"name": "vit", "image_size": 64, "patch_size": 8, "dim": 384, "depth": 6, "heads": 6},
    "batch_size": 16,
    "steps": 1,
}


class AllTokens(MAE):
    """Hidden patches become a learned token in front of the encoder, as in SimMIM; the rest is MAE's."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.hidden = torch.nn.Parameter(torch.zeros(1, 1, self.encoder.config.dim))

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        tokens = torch.where(mask.mask[:, :, None] > 0, self.hidden, self.encoder.patch_embed(images))
        return self.encoder.encode(tokens + self.encoder.pos_embed[:, 1:])  # [B, 1 + L, D]

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        x = self.decoder.embed(self.encode(images, mask)) + self.decoder.get_buffer("pos_embed")
        for block in self.decoder.blocks:
            x = block(x)
        return Output(self.loss(images, self.decoder.pred(self.decoder.norm(x))[:, 1:], mask.mask))


def masked_and_plain(document: dict[str, Any]) -> dict[str, Method]:
    methods = {}
    for name, cls in (("mae", MAE), ("all", AllTokens)):
        with mock.patch("workloads.methods.mae.MAE", cls):  # where the catalog finds it
            methods[name] = synthetic.build(document)[1]
    return methods


def masking(document: dict[str, Any], steps: int, rounds: int) -> dict[str, Any]:
    """Seconds a step, round by round, of MAE (`mae`) and of AllTokens (`all`), and the ratio of their FLOPs."""
    from workloads.flops import count

    synthetic.one_thread()
    batch = synthetic.images(document["batch_size"], document["model"]["image_size"])
    methods = masked_and_plain(document)
    flops = {name: count(method, batch, synthetic.START) for name, method in methods.items()}
    assert flops["mae"] is not None and flops["all"] is not None
    seconds = masked.in_turn(methods, batch, steps, rounds)
    return {**seconds, "predicted": flops["all"] / flops["mae"]}


def stall(document: dict[str, Any], interval: int, checkpoints: int) -> dict[str, float]:
    """What a checkpoint costs the loop, by the loop's own curve: every other interval begins with one.

    Args:
        document: of a job.
        interval: steps in which a checkpoint is written to the end.
        checkpoints: how many.

    Returns:
        medians: `step_s` in the intervals without; `cost_s`, by how much an interval with one is longer, which holds
        also the looks before it and what the thread that writes takes from the steps; `save_s` of it in `save`.
    """
    from workloads.checkpoint import Checkpoints
    from workloads.train import train

    synthetic.one_thread()
    rhythm = {"log_steps": interval, "checkpoint": {"every_steps": 2 * interval}}
    spec = JobSpec.model_validate(document | rhythm | {"steps": (checkpoints + 1) * 2 * interval})
    inside: list[float] = []
    save = Checkpoints.save

    def timed(*arguments: Any, **more: Any) -> None:
        began = time.perf_counter()
        save(*arguments, **more)
        inside.append(time.perf_counter() - began)

    with tempfile.TemporaryDirectory() as folder, mock.patch.object(Checkpoints, "save", timed):
        run = RunFolder(Path(folder))
        train(spec, run, Path())
        step_s = [point["step_time_s"] for point in run.read_metrics()]
    without, begun_with_one = statistics.median(step_s[1::2]), statistics.median(step_s[2::2])
    return {
        "step_s": without,
        "cost_s": interval * (begun_with_one - without),
        "save_s": statistics.median(inside[:-1]),
    }


def rows(folder: Path, shards: str) -> list[Row]:
    """(what, measured, wanted, reached)."""
    one = apart.run(loop.measure, shards=shards)
    two_document = loop.spec_of(shards, 80) | {"resources": {"workers": 2}}
    two = apart.run(workers.rates_on_own_cluster, document=two_document, folder=str(folder / "two"), rounds=24)
    tokens = apart.run(masking, document=MASKING, steps=2, rounds=5)
    held = apart.run(stall, document=STALL | {"data": {"train": {"shards": shards}}}, interval=12, checkpoints=4)
    of_one, of_two = apart.ratio(one["ours"], one["bare"]), apart.ratio(two["ours"], two["bare"])
    faster = apart.ratio(tokens["all"], tokens["mae"])
    every = CheckpointPolicy().every_steps
    share = held["cost_s"] / (every * held["step_s"])
    return [
        ("engine: steps/s of the loop / bare PyTorch loop", f"{of_one:.3f}", ">= 0.98", of_one >= 0.98),
        (
            "engine: steps/s of two workers under Ray Train / two of torchrun, both DDP on gloo",
            f"{of_two:.3f} ({statistics.median(two['ours']):.2f} / {statistics.median(two['bare']):.2f})",
            ">= 0.97",
            of_two >= 0.97,
        ),
        (
            "engine: step that encodes all tokens / MAE step; what their FLOPs predict",
            f"{faster:.2f}; {tokens['predicted']:.2f}",
            "within 15 %",
            abs(faster / tokens["predicted"] - 1) <= 0.15,
        ),
        (
            f"engine: what a checkpoint costs the loop every {every} steps (the default), 20 million parameters",
            f"{100 * share:.2f} % ({1e3 * held['cost_s']:.0f} ms, of which in `save` {1e3 * held['save_s']:.0f} ms, "
            f"for {every} steps of {held['step_s']:.2f} s)",
            "<= 5 %",
            share <= 0.05,
        ),
        *growth.rows(folder, shards),
    ]
