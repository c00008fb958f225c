"""What a step of masked methods costs beside MAE's, and MAE's beside the plainest implementation of it."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tests.benchmarks import apart, synthetic
from tests.benchmarks.table import Row
from workloads import assemble, catalog
from workloads.flops import count
from workloads.methods.base import Batch, DataInfo, Inputs, Method, Output, Progress
from workloads.models.encoders import build_encoder
from workloads.models.vit import sincos_2d
from workloads.parts.frozen import Frozen
from workloads.spec import JobSpec

DECODER = {"decoder_dim": 192, "decoder_depth": 1, "decoder_heads": 4}
METHODS: dict[str, dict[str, Any]] = {
    "mae": {"name": "mae", **DECODER},
    "dmae": {"name": "dmae", "teacher": "a", "student_blocks": [3], "teacher_blocks": [3], **DECODER},
    "maskfeat": {"name": "maskfeat"},
    "maskdistill": {"name": "maskdistill", "teacher": "a"},
}
JOB: dict[str, Any] = {  # wide enough for matrix products to be most of the work
    "name": "bench-masked",
    "method": METHODS["mae"],
    "model": {"name": "vit", "image_size": 64, "patch_size": 8, "dim": 384, "depth": 6, "heads": 6},
    "batch_size": 16,
    "steps": 1,
}


class PlainMAE(nn.Module):
    """MAE out of timm's blocks, as one would write it down from the paper: no job, no keys of samples."""

    def __init__(self, spec: JobSpec) -> None:
        from workloads.models.timm_import import timm

        super().__init__()
        model, method = spec.model.config, spec.method.config
        self.p, dim, width = model["patch_size"], model["dim"], method["decoder_dim"]
        grid = model["image_size"] // self.p
        self.embed = nn.Conv2d(3, dim, self.p, self.p)
        self.cls = nn.Parameter(torch.zeros(1, 1, dim))
        self.token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("positions", sincos_2d(dim, grid)[None])
        self.register_buffer("decoder_positions", sincos_2d(width, grid)[None])
        self.blocks = nn.Sequential(
            *[timm.models.vision_transformer.Block(dim, model["heads"], qkv_bias=True) for _ in range(model["depth"])]
        )
        heads, depth = method["decoder_heads"], method["decoder_depth"]
        self.decoder = nn.Sequential(
            *[timm.models.vision_transformer.Block(width, heads, qkv_bias=True) for _ in range(depth)],
            nn.LayerNorm(width),
            nn.Linear(width, self.p**2 * 3),
        )
        self.norm, self.narrow = nn.LayerNorm(dim), nn.Linear(dim, width)

    def forward(self, batch: Batch, _: Progress) -> Output:
        images: Tensor = batch["image"]
        positions, decoder_positions = self.get_buffer("positions"), self.get_buffer("decoder_positions")
        x = self.embed(images).flatten(2).transpose(1, 2) + positions[:, 1:]
        B, L, D = x.shape
        order = torch.rand(B, L).argsort(dim=1)
        keep, back = order[:, : L // 4, None], order.argsort(dim=1)[:, :, None]
        x = x.gather(1, keep.expand(-1, -1, D))
        x = torch.cat([(self.cls + positions[:, :1]).expand(B, -1, -1), x], dim=1)
        x = self.narrow(self.norm(self.blocks(x)))
        W = x.shape[2]
        patches = torch.cat([x[:, 1:], self.token.expand(B, L - L // 4, -1)], dim=1).gather(1, back.expand(-1, -1, W))
        predicted = self.decoder(torch.cat([x[:, :1], patches], dim=1) + decoder_positions)[:, 1:]
        target = nn.functional.unfold(images, self.p, stride=self.p).transpose(1, 2)
        mean, var = target.mean(-1, keepdim=True), target.var(-1, keepdim=True)
        error = (predicted - (target - mean) / (var + 1e-6).sqrt()).square().mean(-1)
        return Output(error[back[:, :, 0] >= L // 4].mean())


def built(document: dict[str, Any], method: dict[str, Any]) -> Method:
    """A method; its teacher is another network of the student's size."""
    spec = JobSpec.model_validate({"data": {"train": {"shards": "synthetic"}}} | document | {"method": method})
    cls = catalog.load("method", spec.method.name)
    size = assemble.image_size(spec)
    inputs = Inputs(
        encoder=build_encoder(spec.model),
        data=DataInfo(num_instances=1, num_classes=0, shape=(3, size, size)),
        load=lambda _: Frozen(build_encoder(spec.model)),
        build=lambda _: NotImplemented,
    )
    made: Method = cls(cls.Config.model_validate(spec.method.config), inputs)
    return made


def step_times(
    document: dict[str, Any], methods: dict[str, dict[str, Any]], steps: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Seconds a step, round by round, of each method and of `plain`, and the FLOPs of a step."""
    synthetic.one_thread()
    batch = synthetic.images(document["batch_size"], document["model"]["image_size"])
    spec, _ = synthetic.build(document)
    models: dict[str, nn.Module] = {name: built(document, method) for name, method in methods.items()}
    flops = {name: count(model, batch, synthetic.START) for name, model in models.items() if isinstance(model, Method)}
    models["plain"] = PlainMAE(spec)
    return {"seconds": in_turn(models, batch, steps, rounds), "flops": flops}


def in_turn(models: Mapping[str, nn.Module], batch: Batch, steps: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step of training in each round, in which the models take turns of so many steps; one warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in models}
    optimizers = {
        name: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)
        for name, model in models.items()
    }
    for _ in range(rounds + 1):
        for name, model in models.items():
            began = time.perf_counter()
            for _ in range(steps):
                optimizers[name].zero_grad()
                model(batch, synthetic.START).loss.backward()
                optimizers[name].step()
                if isinstance(model, Method):
                    model.after_step(synthetic.START)
            seconds[name].append((time.perf_counter() - began) / steps)
    return {name: values[1:] for name, values in seconds.items()}


def rows() -> list[Row]:
    """(what, measured, wanted, reached)."""
    found = apart.run(step_times, document=JOB, methods=METHODS, steps=1, rounds=16)
    seconds, flops = found["seconds"], found["flops"]
    plain = apart.ratio(seconds["mae"], seconds["plain"])
    made: list[Row] = [
        (
            "masked: step of MAE / of the plainest implementation, out of timm's blocks",
            f"{plain:.2f} ({statistics.median(seconds['mae']):.2f} / {statistics.median(seconds['plain']):.2f} s)",
            "<= 1.00",
            plain <= 1.005,  # what two digits show
        )
    ]
    for name in METHODS:
        if name != "mae":
            ratio, predicted = apart.ratio(seconds[name], seconds["mae"]), flops[name] / flops["mae"]
            made.append(
                (
                    f"masked: step of {name} / of MAE; what their FLOPs predict",
                    f"{ratio:.2f}; {predicted:.2f}",
                    "at most 15 % more",
                    ratio <= 1.15 * predicted,
                )
            )
    return made
