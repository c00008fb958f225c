"""Jobs, methods and batches without data, and what every process that is measured on a CPU does first."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from workloads import assemble
from workloads.data.allocator import keep_freed_memory
from workloads.methods.base import Batch, DataInfo, Method, Progress
from workloads.ranks import Ranks
from workloads.spec import JobSpec

START = Progress(step=0, epoch=0, total_steps=1)


def one_thread() -> None:
    """One thread, and no page faults."""
    torch.set_num_threads(1)
    keep_freed_memory()


def own_rank() -> Ranks:
    """This process among those of torchrun, which can exchange tensors by gloo."""
    ranks = Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))
    if ranks.world_size > 1:
        dist.init_process_group("gloo")
    return ranks


def leave() -> None:
    """Ends the exchange of tensors; nobody may hold a model of DDP any more.

    If DDP held the last reference to gloo, it would join gloo's thread with Python's lock in its hands, for which that
    thread may be waiting (torch 2.13).
    """
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def build(document: dict[str, Any]) -> tuple[JobSpec, Method]:
    """A job and its method; nobody reads its shards."""
    spec = JobSpec.model_validate({"data": {"train": {"shards": "synthetic"}}} | document)
    size = assemble.image_size(spec)
    return spec, assemble.build_method(spec, DataInfo(num_instances=1, num_classes=0, shape=(3, size, size)), Path())


def images(n: int, size: int) -> Batch:
    """What a CPU's loop gives to a method: float32 [n, 3, size, size] with keys."""
    number = torch.arange(n)
    return {"image": torch.rand(n, 3, size, size), "key": number, "index": number}
