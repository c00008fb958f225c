"""Makes a slice of a run again, in one process without Ray, and says whether it is equal.

    plan:    job, curve, provenance and checkpoints of the run -> where to start, what can be compared
    replay:  that checkpoint in a scratch folder -> `workloads.train` to the end of the slice -> what differs

The folder of the run is only read. How the parts are found is in `workloads.replay_plan`, what is compared in
`workloads.replay_report`.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import Seal
from workloads.data.allocator import keep_freed_memory
from workloads.metrics import OnPoint
from workloads.ranks import Ranks
from workloads.record import RunFolder, write_atomic
from workloads.replay_plan import Plan
from workloads.replay_report import TOLERANCE, Report, compare_curves, compare_weights, read_weights
from workloads.train import train


def replay(plan: Plan, home: Path, on_point: OnPoint = lambda _: None) -> Report:
    """Trains the slice in a temporary folder, which is removed however this ends.

    Args:
        plan: what to do.
        home: where references of `init` and of teachers are looked up.
        on_point: gets each point of the curve.

    Raises:
        RuntimeError, ValueError, OSError: what `train` raises.
    """
    replayed: dict[int, dict[str, Any]] = {}

    def seen(point: dict[str, Any]) -> None:
        replayed[point["step"]] = point
        on_point(point)

    keep_freed_memory()
    # The mirror is the run's: it is neither written nor continued from. On the disk here one checkpoint is enough.
    policy = plan.spec.checkpoint.model_copy(update={"mirror": None, "keep": 1, "keep_best": 0})
    spec = plan.spec.model_copy(update={"checkpoint": policy})
    polls = itertools.count(plan.start_step + 1)  # one process asks exactly once after each step
    with tempfile.TemporaryDirectory(prefix="manta-replay-", ignore_cleanup_errors=True) as scratch, _untracked():
        run, kept = RunFolder(Path(scratch) / plan.run.path.name), Path(scratch) / "kept"
        if plan.start is not None:
            _link(plan.run.checkpoints, plan.start, run.checkpoints)
        if plan.kept is not None:  # now: a run that goes on may remove it meanwhile
            _link(plan.run.checkpoints, plan.kept, kept)
        run.path.mkdir(exist_ok=True)
        before = (json.dumps(point) for step, point in plan.curve.items() if step <= plan.start_step)
        write_atomic(run.metrics, "".join(f"{line}\n" for line in before))  # guards go by the first points of a run
        ranks = Ranks(device=plan.device)
        train(spec, run, home, ranks, should_stop=lambda: next(polls) >= plan.last, on_point=seen)
        weights = None
        if plan.kept is not None:
            end = files.read_seal(run.checkpoints, plan.last)
            assert end is not None
            weights = compare_weights(read_weights(kept, plan.kept), read_weights(run.checkpoints, end))
    curve = compare_curves({step: plan.curve[step] for step in plan.compared}, replayed)
    near = max(curve.largest.values()) <= TOLERANCE
    same = curve.first_difference is None and (weights is None or weights.tensor is None)
    return Report(
        equal=near if plan.inexact else same,
        expected=f"within {TOLERANCE:g} relative: {'; '.join(plan.inexact)}" if plan.inexact else "bit-equal",
        trained=plan.cost,
        curve=curve,
        weights=weights,
        environment=plan.environment,
        notes=plan.notes,
    )


def _link(source: Path, seal: Seal, target: Path) -> None:
    """Makes a checkpoint the latest of another folder, without a copy where both are on one disk."""
    for name in seal.files:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(source / name, target / name)
        except OSError:
            shutil.copyfile(source / name, target / name)
    files.complete(target, seal)


@contextlib.contextmanager
def _untracked() -> Iterator[None]:
    """Within, no MLflow server hears of what is trained: a replay is no run of its own."""
    uri = os.environ.pop("MLFLOW_TRACKING_URI", None)
    try:
        yield
    finally:
        if uri is not None:
            os.environ["MLFLOW_TRACKING_URI"] = uri
