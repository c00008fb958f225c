"""The worker loop: the only one. Runs under Ray Train, in a job's own driver, and with no Ray at all.

    restore -> for each step: rows of this rank -> views -> loss of each micro-batch -> optimizer -> after_step
    every `log_steps`: a point of the curve; every `checkpoint.every_steps` and at the end: a checkpoint

Everything that a step does is a function of (spec, step, rank, world size): the data,
the learning rate, the random numbers. So a run that was killed continues with the very
weights that it would have had. What can be done beside the loop is done there: how the
method is spread (`parallel`), one step (`step`), what watches (`monitor`), checkpoints.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from workloads import assemble, checkpoint, provenance
from workloads.agreement import Agreement
from workloads.batches import to_device
from workloads.checkpoint import Checkpoints
from workloads.data.ahead import ahead
from workloads.data.modalities import Views
from workloads.data.reader import Reader
from workloads.guards import CollapseError, DivergenceError
from workloads.methods.base import Batch, Progress
from workloads.metrics import NonFiniteLossError, OnPoint
from workloads.monitor import Monitor, flops_of_step
from workloads.parallel import Spread
from workloads.parts import optimizers, schedules
from workloads.ranks import Ranks
from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec
from workloads.step import Stepper

logger = logging.getLogger(__name__)


def total_steps(spec: JobSpec, steps_per_epoch: int) -> int:
    return spec.steps if spec.steps is not None else max(1, round((spec.epochs or 0) * steps_per_epoch))


def train(
    spec: JobSpec,
    run: RunFolder,
    home: Path,
    ranks: Ranks | None = None,
    *,
    should_stop: Callable[[], bool] = lambda: False,
    preempted: Callable[[], bool] = lambda: False,
    on_point: OnPoint = lambda _: None,
) -> bool:
    """Trains from the newest checkpoint of `run` to the end of the job.

    Args:
        spec: the job; `batch_size` is global, a rank takes its contiguous share of each batch.
        run: where checkpoints and metrics go; a second call on the same folder continues.
        home: where references such as name@version are looked up.
        ranks: this process among those of the job.
        should_stop: polled; when true on any rank, all checkpoint and return.
        preempted: polled; once true on any rank, each step is followed by a checkpoint.
        on_point: gets each point of the curve on rank 0.

    Returns:
        True when the job is done, False when it was stopped.

    Raises:
        ValueError: spec and data do not fit (preflight finds most of it before).
        NonFiniteLossError, DivergenceError, CollapseError: the last good checkpoint is kept, and the latest again.
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

    def moved(batch: Batch, through: Views = views) -> Batch:
        return to_device(batch, through, ranks.device, channels_last=model.channels_last)

    def scan(stream: str, through: Views | None = None, rows: range | None = None) -> Iterator[Batch]:
        manifest, through = manifests[stream], through or views
        rows = rows or range(len(manifest))
        size = spec.batch_size // (ranks.world_size * spec.accumulation_on(ranks.world_size))
        reader = Reader(manifest, through, batch_size=size, seed=spec.seed, shuffle=False, drop_last=False)
        start = rows.start // size
        stop = start + -(-len(rows) // size) + (len(rows) < len(manifest))  # a part may begin and end within a batch
        with torch.no_grad(), contextlib.closing(reader.batches(start, stop)) as batches:
            for batch in batches:
                yield moved(batch, through)

    run.path.mkdir(parents=True, exist_ok=True)
    goes_on = checkpoint.latest_step(run.checkpoints) is not None  # then `init` would be loaded to be overwritten
    fresh = spec.model_copy(update={"init": None}) if goes_on else spec
    method = assemble.build_method(fresh, assemble.data_info(spec, manifests[first]), home).to(ranks.device)
    flops = flops_of_step(spec, method, readers, views, ranks)  # before blocks are changed, which would falsify it
    model = Spread(method, spec.engine, ranks)
    optimizer = optimizers.build(method.parameter_groups(), spec.optimizer)
    forwarded = threading.Event()
    stepper = Stepper(spec, model, optimizer, ranks, forwarded.set)
    with contextlib.ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(run.checkpoints, spec.checkpoint, ranks, sharded=model.in_parts))
        restored = checkpoints.restore(method, optimizer)
        stack.enter_context(checkpoints.back_after(NonFiniteLossError, DivergenceError, CollapseError))
        if restored.step:
            stepper.load_state_dict(restored.extra)
        if ranks.rank == 0:
            write_atomic(run.total_steps, str(total))  # tells the journal that the job is running
            for line in provenance.keep(run, provenance.provenance(spec, ranks.device, manifests)):
                logger.warning("since the attempt before: %s", line)
        logger.info(
            "%s: step %d of %d, %d steps an epoch, rank %d of %d",
            *(spec.name, restored.step, total, steps_per_epoch, ranks.rank, ranks.world_size),
        )
        monitor = stack.enter_context(Monitor(spec, run, ranks, readers, flops, restored, on_point))
        agreement = Agreement(ranks, should_stop, preempted)
        on_gpu = ranks.device.type == "cuda"
        sources = {}
        for name, reader in readers.items():
            raw = reader.batches(restored.step, total, ranks.rank, ranks.world_size, pin_memory=on_gpu)
            stack.enter_context(contextlib.closing(raw))
            made = (moved(batch) for batch in raw)
            # On a CPU it is done a batch ahead, in a thread, or it would cost the step 1 %; and not beside the forward
            # pass, where it costs as much, since two threads hand Python to and fro. Several ranks then exchange.
            quiet = forwarded if ranks.world_size == 1 else None
            sources[name] = stack.enter_context(contextlib.closing(made if on_gpu else ahead(made, 1, quiet)))
        method.train()
        point = {}
        step = restored.step
        while step < total:
            progress = Progress(step=step, epoch=step // steps_per_epoch, total_steps=total)
            fetched = time.perf_counter()
            streams = {name: next(source) for name, source in sources.items()}
            wait_s = time.perf_counter() - fetched
            lr = schedules.apply(optimizer, spec, step, total, steps_per_epoch)
            done = stepper(streams, progress)
            method.after_step(progress)
            step += 1
            if step % steps_per_epoch == 0:
                with monitor.patient(), model.whole():
                    method.after_epoch(progress, scan)
            monitor.step(step, done, wait_s)

            wish = agreement.after(step)
            save = wish != "go on" or step % spec.checkpoint.every_steps == 0 or step == total
            if save:
                monitor.features(model, method, streams, views)  # which this point of the curve shows
            if save or step % spec.log_steps == 0:
                point = monitor.point(step, progress.epoch, stepper, lr=lr)
            if save:
                monitor.checkpoint(step, model)
                with monitor.patient():
                    extra, metric = stepper.state_dict(), point.get(spec.checkpoint.metric)
                    checkpoints.save(step, method, optimizer, extra=extra, metric=metric, suspect=monitor.suspicious)
            if wish == "stop":
                break
        with monitor.patient():
            checkpoints.wait()
            ranks.barrier()
        if step < total:
            logger.info("stopped at step %d of %d, checkpoint written", step, total)
    return step >= total
