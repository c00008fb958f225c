"""How the costs of a run grow: steps with the number of ranks, checkpoints with the model, and what a start costs."""

from __future__ import annotations

import contextlib
import copy
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks import apart, loop
from tests.benchmarks.table import Row

WORLDS = (1, 2, 4)
IMAGES = 32  # of each rank
SIZES = ((256, 6), (512, 6), (768, 11))  # width and depth of ViTs of 5, 20 and 80 million parameters
SMALL = {
    "name": "bench-start",
    "method": {"name": "mae", "decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4},
    "model": {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 96, "depth": 3, "heads": 4},
    "steps": 1,
    "batch_size": 32,
}


def step_times(document: dict[str, Any], images: int, steps: int, rounds: int) -> dict[str, float]:
    """Under torchrun: seconds a step of the engine with (`step`) and without (`compute`) the exchange of gradients.

    In the same processes in turn, so that `compute` is on a machine that is as busy. Means over ranks, medians over
    rounds.

    Args:
        document: of a job.
        images: of each rank.
        steps: of a turn.
        rounds: turns, and one to warm up.
    """
    import torch

    from tests.benchmarks import synthetic
    from workloads.parallel import Spread
    from workloads.parts import optimizers
    from workloads.ranks import Ranks
    from workloads.spec import JobSpec
    from workloads.step import Stepper

    synthetic.one_thread()
    ranks = synthetic.own_rank()
    workers = {"batch_size": images * ranks.world_size, "resources": {"workers": ranks.world_size}}
    of_all, method = synthetic.build(document | workers)
    of_one = JobSpec.model_validate(of_all.model_dump() | {"batch_size": images, "resources": {}})
    batch = synthetic.images(images, document["model"]["image_size"])
    steppers = {}
    for name, spec, among in (("step", of_all, ranks), ("compute", of_one, Ranks())):
        own = copy.deepcopy(method)
        model = Spread(own, spec.engine, among)
        steppers[name] = Stepper(spec, model, optimizers.build(own.parameter_groups(), spec.optimizer), among)
    seconds: dict[str, list[float]] = {name: [] for name in steppers}
    for _ in range(rounds + 1):
        for name, stepper in steppers.items():
            ranks.barrier()
            began = time.perf_counter()
            for _ in range(steps):
                stepper({"train": batch}, synthetic.START)
            seconds[name].append(ranks.mean(torch.tensor((time.perf_counter() - began) / steps)).item())
    del own, model, stepper, steppers
    synthetic.leave()
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def start_times(shards: str, folder: str, times: int) -> dict[str, float]:
    """Medians of the seconds from the start of `manta run --local` to its first step's checkpoint, and those of
    `import torch` alone.
    """
    spec = Path(folder) / "start.json"
    spec.write_text(json.dumps(SMALL | {"data": {"train": {"shards": shards}}}))
    to_first_step, importing = [], []
    for i in range(times):
        out, began = Path(folder) / f"start-{i}", time.time()
        manta = [sys.executable, "-c", "from service.cli import main; main()", "run", "--local", str(spec)]
        subprocess.run([*manta, "--out", str(out)], check=True, capture_output=True)
        to_first_step.append((out / "checkpoints" / "step-00000001.pt").stat().st_mtime - began)
        began = time.time()
        subprocess.run([sys.executable, "-c", "import torch"], check=True)
        importing.append(time.time() - began)
    return {"first_step_s": statistics.median(to_first_step), "import_torch_s": statistics.median(importing)}


def group_start_times(shards: str, folder: str, times: int) -> dict[str, float]:
    """Medians of the seconds until two workers under Ray Train are in the loop, and until their first step's
    checkpoint; needs a connected cluster.

    Args:
        shards: of images, whose manifest is made before.
        folder: where to.
        times: groups, one after the other.
    """
    from workloads import assemble, ray_train
    from workloads.record import RunFolder
    from workloads.spec import JobSpec

    workers = {"resources": {"workers": 2}, "data": {"train": {"shards": shards}}}
    spec = JobSpec.model_validate(SMALL | workers)
    assemble.open_stream(spec.data["train"])
    joined, to_first_step = [], []
    for i in range(times):
        run = RunFolder(Path(folder) / f"group-{i}")
        run.path.mkdir()
        began = time.time()
        assert ray_train.train_on_ray(spec, run, Path(folder), connected=lambda: None)
        joined.append(next(event["time"] for event in run.read_events() if event["kind"] == "workers_joined") - began)
        to_first_step.append((run.checkpoints / "step-00000001.pt").stat().st_mtime - began)
    return {"joined_s": statistics.median(joined), "first_step_s": statistics.median(to_first_step)}


def idle_share(head: int, seconds: float) -> float:
    """Of one core that the processes of a cluster take while nothing is asked of it.

    Args:
        head: the process that the others come from.
        seconds: to watch them.
    """

    def used() -> dict[int, float]:
        found = {}
        for process in (psutil.Process(head), *psutil.Process(head).children(recursive=True)):
            with contextlib.suppress(psutil.NoSuchProcess):  # workers end when nothing has been asked of them for long
                times = process.cpu_times()
                found[process.pid] = times.user + times.system
        return found

    before = used()
    time.sleep(seconds)
    return sum(now - before.get(pid, 0.0) for pid, now in used().items()) / seconds


def costs_of_own_cluster(shards: str, folder: str, times: int) -> dict[str, float]:
    """`group_start_times` and `idle_share` of a cluster that is there for nothing else."""
    with apart.own_cluster(Path(folder) / "home") as head:
        return group_start_times(shards, folder, times) | {"idle": idle_share(head.pid, 20.0)}


def checkpoint_times(dim: int, depth: int, folder: str, saves: int) -> dict[str, float]:
    """Medians of the seconds that `save` holds the loop up, and until the checkpoint is on the disk.

    Args:
        dim: width of the ViT, trained by AdamW.
        depth: its blocks.
        folder: where to.
        saves: how many, and one that takes the memory for the copy.
    """
    import torch

    from tests.benchmarks import synthetic
    from workloads.checkpoint import Checkpoints
    from workloads.models.vit import ViTConfig
    from workloads.parts.optimizers import adamw
    from workloads.ranks import Ranks
    from workloads.spec_training import CheckpointPolicy

    synthetic.one_thread()
    model = ViTConfig(image_size=32, patch_size=8, dim=dim, depth=depth, heads=4).build()
    optimizer = adamw([{"params": list(model.parameters())}], betas=(0.9, 0.95), weight_decay=0.05)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()  # makes the moments
    held, whole = [], []
    with Checkpoints(Path(folder), CheckpointPolicy(keep=1), Ranks()) as checkpoints:
        for step in range(1, saves + 2):
            began = time.perf_counter()
            checkpoints.save(step, model, optimizer, extra={}, metric=None)
            held.append(time.perf_counter() - began)
            checkpoints.wait()
            whole.append(time.perf_counter() - began)
    return {
        "millions": sum(parameter.numel() for parameter in model.parameters()) / 1e6,
        "held_s": statistics.median(held[1:]),
        "disk_s": statistics.median(whole[1:]),
    }


def rows(folder: Path, shards: str) -> list[Row]:
    """Nothing to reach, to be watched."""
    document = {key: value for key, value in loop.spec_of(shards, 1).items() if key != "data"}
    steps = [apart.run(step_times, ranks=n, document=document, images=IMAGES, steps=8 // n, rounds=3) for n in WORLDS]
    start = start_times(shards, str(folder), times=3)
    (folder / "groups").mkdir()
    group = apart.run(costs_of_own_cluster, shards=shards, folder=str(folder / "groups"), times=3)
    saved = [
        apart.run(checkpoint_times, dim=dim, depth=depth, folder=str(folder / f"saved-{dim}"), saves=2)
        for dim, depth in SIZES
    ]
    millions = " / ".join(f"{one['millions']:.0f}" for one in saved)
    held = " / ".join(f"{1e3 * one['held_s']:.0f}" for one in saved)
    disk = " / ".join(f"{one['disk_s']:.2f}" for one in saved)
    parts = [f"{s['step']:.3f} ({s['compute']:.3f} + {s['step'] - s['compute']:.3f})" for s in steps]
    return [
        (
            f"cost: a step at {' / '.join(map(str, WORLDS))} ranks of one thread and {IMAGES} images each (compute + "
            f"exchange of gradients) on {os.cpu_count()} cores",
            f"{' / '.join(parts)} s",
            "-",
            None,
        ),
        (
            "cost: start of `manta run --local` to its first step; of which `import torch`",
            f"{start['first_step_s']:.1f} s; {start['import_torch_s']:.1f} s",
            "-",
            None,
        ),
        (
            "cost: start of two workers under Ray Train, the cluster being up: to both in the loop; to the first step",
            f"{group['joined_s']:.1f} s; {group['first_step_s']:.1f} s",
            "-",
            None,
        ),
        ("cost: a cluster in which nothing runs", f"{group['idle']:.1%} of a core", "-", None),
        (
            f"cost: a checkpoint of {millions} million parameters: the loop is held up; until it is on the disk",
            f"{held} ms; {disk} s",
            "-",
            None,
        ),
    ]
