"""Toy shards and jobs: small enough that a job of a few steps takes a second."""

from __future__ import annotations

import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from workloads.data.keys import sample_keys
from workloads.spec import JobSpec


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def write_shards(folder: Path, prefix: str, samples: int, shards: int, *, seed: int = 0, size: int = 16) -> str:
    """Images of 4 classes that differ in their mean colour; returns the brace pattern."""
    rng = np.random.default_rng(seed)
    for shard in range(shards):
        with webdataset.TarWriter(str(folder / f"{prefix}-{shard:06d}.tar"), mtime=0) as writer:
            for i in range(shard, samples, shards):
                label = i % 4
                pixels = rng.integers(0, 120, (size, size, 3)) + np.array([label * 30, 90 - label * 30, 40])
                writer.write(
                    {"__key__": f"{prefix}{i:05d}", "png": png(pixels.astype(np.uint8)), "cls": str(label).encode()}
                )
    (folder / "classes.txt").write_text("a\nb\nc\nd\n")
    return str(folder / f"{prefix}-{{000000..{shards - 1:06d}}}.tar")


@pytest.fixture(scope="session")
def toy_shards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """`train`: 80 images in 3 shards, `test`: 40 in one; 16 x 16 pixels, 4 classes. `volumes`: 80 of them."""
    from tests.toy_volumes import write_volumes  # nibabel, which few runs need

    folder = tmp_path_factory.mktemp("toy")
    images = {"train": write_shards(folder, "train", 80, 3), "test": write_shards(folder, "test", 40, 1, seed=1)}
    return images | {"volumes": write_volumes(folder / "volumes", {"train": 80})["train"]}


def difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The largest difference of two sets of weights that were summed in another order.

    The bias of attention's keys is left out: softmax does not see it, so its gradient is nothing but
    rounding, which AdamW enlarges to the size of the learning rate.
    """
    assert a.keys() == b.keys()
    worst = 0.0
    for name, value in a.items():
        delta = (value - b[name]).abs()
        if name.endswith("attn.qkv.bias"):
            q, _, v = delta.chunk(3)
            delta = torch.cat([q, v])
        worst = max(worst, delta.max().item())
    return worst


def random_images(n: int = 4, size: int = 16) -> dict[str, torch.Tensor]:
    """A batch as the loop gives it to a method: float32 [n, 3, size, size], and labels of two classes in turn."""
    index = torch.arange(n)
    return {
        "image": torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(1)),
        "index": index,
        "key": sample_keys(0, 0, index),
        "label": index % 2,
    }


def no_load(name: str) -> Any:
    """For a method that needs nobody else's weights."""
    raise AssertionError(name)


TOY_MODEL = {"name": "vit", "image_size": 16, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
TOY_MAE = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def make_job(toy_shards: dict[str, str], **changes: Any) -> JobSpec:
    """A JobSpec of 2 epochs of 10 steps; keywords replace its fields."""
    document: dict[str, Any] = {
        "name": "toy",
        "method": TOY_MAE,
        "model": TOY_MODEL,
        "data": {"train": {"shards": toy_shards["train"]}},
        "epochs": 2,
        "batch_size": 8,
        "optimizer": {"lr": 1e-3},
        "schedule": {"warmup_epochs": 0.5},
        "checkpoint": {"every_steps": 5},
    }
    return JobSpec.model_validate(document | changes)


@pytest.fixture
def toy_job(toy_shards: dict[str, str]) -> Callable[..., JobSpec]:
    """`make_job` over the toy shards."""
    return partial(make_job, toy_shards)
