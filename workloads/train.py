"""The worker loop: the only one. Runs under Ray Train, in a job's own driver, and with no Ray at all.

    restore -> for each step: rows of this rank -> views -> loss of each micro-batch -> optimizer -> after_step
    every LOG_STEPS: a point of the curve; every `checkpoint.every_steps` and at the end: a checkpoint

Everything that a step does is a function of (spec, step, rank, world size): the data,
the learning rate, the random numbers. So a run that was killed continues with the very
weights that it would have had.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from workloads import assemble, checkpoint
from workloads.data.keys import mix
from workloads.data.modalities import Views
from workloads.data.reader import Reader
from workloads.data.transforms.image import finish
from workloads.data.views import View
from workloads.methods.base import Batch, Progress
from workloads.metrics import Curve, MetricsWriter, NonFiniteLossError, OnPoint, SkippedLog, Warnings
from workloads.parts.optimizers import adamw
from workloads.parts.schedules import warmup_cosine
from workloads.ranks import Ranks
from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec

logger = logging.getLogger(__name__)

LOG_STEPS = 10  # also how often ranks agree on a stop


def total_steps(spec: JobSpec, steps_per_epoch: int) -> int:
    return spec.steps if spec.steps is not None else max(1, round((spec.epochs or 0) * steps_per_epoch))


def learning_rate(spec: JobSpec, step: int, total: int, steps_per_epoch: int) -> float:
    """Rate of the step that follows `step` done ones, before the groups' own scales."""
    base = spec.optimizer.lr * (spec.batch_size / 256 if spec.optimizer.scale_lr else 1.0)
    warmup = spec.schedule.warmup_epochs * steps_per_epoch
    return warmup_cosine(step, warmup=warmup, total=total, base=base, minimum=spec.schedule.min_lr)


def seed_micro_batch(seed: int, step: int, micro_batch: int) -> None:
    """Seeds torch by the global number of the micro-batch: 1 rank with 8 of them draws what 8 ranks with 1 draw."""
    draw = mix(mix(mix(torch.tensor(seed)) + step) + micro_batch)
    torch.manual_seed(int(draw) & (2**63 - 1))


def to_device(batch: Batch, views: Views, device: torch.device) -> Batch:
    """Moves a batch; images arrive as bytes and leave as normalised floats, their colours changed."""
    moved = {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    for name, view in views.items():
        if isinstance(view, View):
            moved[name] = finish(moved[name], view, batch["key"], name)
    return moved


def micro_batches(batch: Batch, n: int) -> list[Batch]:
    size = len(batch["index"]) // n
    return [{name: value[i * size : (i + 1) * size] for name, value in batch.items()} for i in range(n)]


def train(
    spec: JobSpec,
    run: RunFolder,
    home: Path,
    ranks: Ranks | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    on_point: OnPoint = lambda _: None,
) -> bool:
    """Trains from the newest checkpoint of `run` to the end of the job.

    Args:
        spec: the job; `batch_size` is global, a rank takes its contiguous share of each batch.
        run: where checkpoints and metrics go; a second call on the same folder continues.
        home: where references such as name@version are looked up.
        ranks: this process among those of the job.
        should_stop: polled; when true on any rank, all checkpoint and return.
        on_point: gets each point of the curve on rank 0.

    Returns:
        True when the job is done, False when it was stopped.

    Raises:
        ValueError: spec and data do not fit (preflight finds most of it before).
        NonFiniteLossError: with the step; the last good checkpoint is kept.
        CheckpointError: a checkpoint could not be written or read.
    """
    ranks = ranks or Ranks()
    views = assemble.views_of(spec)
    method_cls, _ = assemble.method_of(spec)
    manifests = {name: assemble.open_stream(spec.data[name]) for name in method_cls.streams}
    readers = assemble.readers_of(spec, manifests)
    first = method_cls.streams[0]
    steps_per_epoch = readers[first].steps_per_epoch
    total = total_steps(spec, steps_per_epoch)

    method = assemble.build_method(spec, assemble.data_info(spec, manifests[first]), home).to(ranks.device)
    optimizer = adamw(method.parameter_groups(), betas=spec.optimizer.betas, weight_decay=spec.optimizer.weight_decay)
    start = checkpoint.restore(run.checkpoints, method, optimizer)
    model = ranks.wrap(method)
    if ranks.rank == 0:
        run.path.mkdir(parents=True, exist_ok=True)
        write_atomic(run.total_steps, str(total))  # tells the journal that the job is running
    logger.info(
        "%s: step %d of %d, %d steps an epoch, rank %d of %d",
        spec.name,
        start,
        total,
        steps_per_epoch,
        ranks.rank,
        ranks.world_size,
    )

    def scan(stream: str) -> Iterator[Batch]:
        reader = Reader(
            manifests[stream], views, batch_size=spec.batch_size, seed=spec.seed, shuffle=False, drop_last=False
        )
        with torch.no_grad(), contextlib.closing(reader.batches(0, reader.steps_per_epoch)) as batches:
            for batch in batches:
                yield to_device(batch, views, ranks.device)

    sources = {
        name: reader.batches(start, total, ranks.rank, ranks.world_size, pin_memory=ranks.device.type == "cuda")
        for name, reader in readers.items()
    }
    curve = Curve(ranks, MetricsWriter(run.metrics) if ranks.rank == 0 else None, on_point, spec.batch_size)
    skipped = SkippedLog(run.skipped, readers)
    warnings = Warnings(run.warnings, readers) if ranks.rank == 0 else None
    if ranks.rank == 0:
        skipped.quarantined()
    method.train()
    step = start
    with contextlib.ExitStack() as stack:
        stack.callback(curve.close)
        stack.callback(skipped.write)
        for source in sources.values():
            stack.callback(source.close)
        while step < total:
            progress = Progress(step=step, epoch=step // steps_per_epoch, total_steps=total)
            fetched = time.perf_counter()
            streams = {name: to_device(next(source), views, ranks.device) for name, source in sources.items()}
            waited_s = time.perf_counter() - fetched
            curve.waited(waited_s)
            if warnings is not None:
                warnings.waited(waited_s)
            lr = learning_rate(spec, step, total, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]
            loss, metrics, grad_norm = optimizer_step(spec, model, optimizer, streams, progress, ranks)
            method.after_step(progress)
            step += 1
            if step % steps_per_epoch == 0:
                method.after_epoch(progress, scan)
            curve.add(loss, metrics | ({} if grad_norm is None else {"grad_norm": grad_norm}))

            save = step % spec.checkpoint.every_steps == 0 or step == total
            if save or step % LOG_STEPS == 0:
                curve.point(step, progress.epoch, lr)  # raises on a loss that is not finite: before the checkpoint
                if warnings is not None:
                    warnings.point()
                skipped.write()
                stop = ranks.any(should_stop())
                if save or stop:
                    if not all(bool(parameter.isfinite().all()) for parameter in method.parameters()):
                        raise NonFiniteLossError(f"a weight became infinite or NaN at step {step}")
                    curve.flush()  # the curve up to a checkpoint must outlive whatever comes after it
                    if ranks.rank == 0:
                        checkpoint.save(run.checkpoints, step, method, optimizer, keep=spec.checkpoint.keep)
                    ranks.barrier()
                if stop and step < total:
                    logger.info("stopped at step %d of %d, checkpoint written", step, total)
                    return False
    return True


def optimizer_step(
    spec: JobSpec,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    streams: dict[str, Batch],
    progress: Progress,
    ranks: Ranks,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """One optimizer step over the micro-batches of this rank -> mean loss, last metrics, gradient norm if clipped."""
    n = spec.accumulation_on(ranks.world_size)
    parts = {name: micro_batches(batch, n) for name, batch in streams.items()}
    losses = []
    metrics: dict[str, Tensor] = {}
    for i in range(n):
        batch = {name: batches[i] for name, batches in parts.items()}
        seed_micro_batch(spec.seed, progress.step, ranks.rank * n + i)
        averages = contextlib.nullcontext() if i == n - 1 or ranks.world_size == 1 else model.no_sync()  # type: ignore[operator]
        with averages:
            with torch.autocast(ranks.device.type, torch.bfloat16, enabled=spec.precision == "bf16"):
                output = model(batch if len(batch) > 1 else next(iter(batch.values())), progress)
            metrics = output.metrics
            if output.loss is not None:
                (output.loss / n).backward()
                losses.append(output.loss.detach())
    grad_norm = None
    if spec.optimizer.clip_grad_norm is not None:
        grad_norm = nn.utils.clip_grad_norm_(model.parameters(), spec.optimizer.clip_grad_norm)
    if losses:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return torch.stack(losses).mean() if losses else torch.zeros(()), metrics, grad_norm
