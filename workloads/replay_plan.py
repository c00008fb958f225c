"""What of a run can be made again, from where, and how near it can be expected to come.

A point of the curve is a mean over the steps since the point before it, so two are compared only where both stand for
the same steps: a stop or a preemption leaves a point that a replay lacks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from workloads import assemble, provenance
from workloads import checkpoint_folder as files
from workloads.checkpoint_folder import Seal
from workloads.data.shards import DataError
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.spec_any import spec_of


class ReplayError(RuntimeError):
    """The run cannot be made again here: its data are others now, or cannot be read."""


@dataclass(frozen=True)
class Plan:
    """What a replay will do.

    Attributes:
        run: the run, which is only read.
        spec: its job.
        device: to train on.
        first: done steps where the slice begins.
        last: and where it ends.
        start: the checkpoint to train from; None: the very start.
        kept: the checkpoint of step `last`, None where the run has none.
        curve: points of the run by step, in order.
        compared: steps of those within the slice that stand for the same steps in a replay.
        inexact: why no more than float tolerance can be expected; [] where bits are.
        environment: how it differs, between attempts of the run and to this process.
        notes: what was passed over.
    """

    run: RunFolder
    spec: JobSpec
    device: torch.device
    first: int
    last: int
    start: Seal | None
    kept: Seal | None
    curve: dict[int, dict[str, Any]]
    compared: list[int]
    inexact: list[str]
    environment: list[str]
    notes: list[str]

    @property
    def start_step(self) -> int:
        return 0 if self.start is None else self.start.step

    @property
    def cost(self) -> str:
        """What it takes, in words."""
        steps = f"{self.last - self.start_step} steps"
        if self.start is not None:
            return f"{steps} from the checkpoint of step {self.start_step}"
        return f"{steps} from the start" + (f": no checkpoint up to step {self.first} is kept" if self.first else "")


def find(job: str, home: Path) -> RunFolder:
    """The run in a folder, or of a job id of the installation in `home`.

    Raises:
        ValueError: there is none.
    """
    for folder in (Path(job), home / "runs" / job):
        run = RunFolder(folder.absolute())
        if run.spec.is_file():
            return run
    raise ValueError(f"got job {job!r}, expected a run folder or the id of a job in {home / 'runs'}; see `manta jobs`")


def slice_of(text: str) -> tuple[int, int]:
    """`"A:B"` -> (A, B).

    Raises:
        ValueError: it is something else, or empty.
    """
    match = re.fullmatch(r"(\d+):(\d+)", text)
    if match is None or int(match[1]) >= int(match[2]):
        raise ValueError(f"got steps {text!r}, expected A:B, two counts of done steps with A < B, such as 100:200")
    return int(match[1]), int(match[2])


def plan(run: RunFolder, first: int, last: int) -> Plan:
    """Looks at a run and its data. Trains nothing, but gives torch the threads that the run had: sums depend on them.

    Args:
        run: as `find` gives it.
        first: done steps where the slice begins.
        last: and where it ends.

    Raises:
        ValueError: the run has not come so far, or has nothing to compare with.
        ReplayError: its data are others now (content hashes do not cover pixels), or cannot be read.
    """
    spec = spec_of(run)
    if not isinstance(spec, JobSpec):
        raise ValueError(
            f"got {run.path}, a search, expected a job that trains; run the search again: a seed decides it"
        )
    curve = {point["step"]: point for point in run.read_metrics()}
    if last > (done := max(curve, default=0)):
        raise ValueError(f"got steps {first}:{last} of a run of {done} steps so far, expected an end of at most {done}")
    entries = provenance.read(run)
    device = torch.device("cuda" if spec.resources.gpus and torch.cuda.is_available() else "cpu")
    threads = entries[-1]["device"].get("threads") if entries else None
    torch.set_num_threads(threads or spec.resources.cpus)
    facts = _facts(spec, device)
    environment = ["the run has no provenance.json: its data and environment are not known"]
    if entries:
        _expect_same_data(entries[-1]["datasets"], facts["datasets"])
        environment = _environment([*entries, facts])
    inexact = ["sums on a GPU have no fixed order"] if device.type == "cuda" else []
    if (workers := spec.resources.max_workers) > 1:
        inexact.append(f"{workers} workers become micro-batches of one process")
    if environment:
        inexact.append("the environment differs")

    notes: list[str] = []
    here = files.steps(run.checkpoints)
    start = _newest_whole(run.checkpoints, (step for step in here if step <= first), notes)
    kept = _newest_whole(run.checkpoints, (step for step in here if step == last), notes)
    theirs = _begins(list(curve), 0)
    ours = own_points(spec, 0 if start is None else start.step, last)
    compared = [step for step in curve if step >= first and step in ours and ours[step] == theirs[step]]
    if not compared and (kept is None or inexact):
        steps = [step for step in curve if not step % spec.log_steps or not step % spec.checkpoint.every_steps]
        some = ", ".join(map(str, steps[:10])) + (", ..." if len(steps) > 10 else "")
        raise ValueError(
            f"got steps {first}:{last}, in which the run has no point of its curve that a replay has too, expected at "
            f"least one; take in one of the steps {some}"
        )
    return Plan(run, spec, device, first, last, start, kept, curve, compared, inexact, environment, notes)


def _facts(spec: JobSpec, device: torch.device) -> dict[str, Any]:
    """The provenance of this process."""
    streams = assemble.method_of(spec)[0].streams
    try:
        manifests = {name: assemble.open_stream(spec.data[name]) for name in streams}
    except (DataError, OSError) as error:
        raise ReplayError(f"the data of the run cannot be read: {error}") from error
    return provenance.provenance(spec, device, manifests)


def _expect_same_data(run: dict[str, Any], now: dict[str, Any]) -> None:
    for name, was in run.items():
        if (here := now.get(name, {})) != was:
            raise ReplayError(
                f"other data: got {name} with {here.get('samples')} samples and content hash "
                f"{here.get('content_hash')}, expected the {was['samples']} samples and {was['content_hash']} that the "
                "run has seen; bring them back to where its job.json says"
            )


def _environment(entries: Sequence[dict[str, Any]]) -> list[str]:
    """What has changed from each entry to the next. `max_duration` may: it changes no number."""
    plain = [entry | {"spec": entry["spec"] | {"max_duration": None}} for entry in entries]
    told = (line for a, b in itertools.pairwise(plain) for line in provenance.difference(a, b))
    return list(dict.fromkeys(told))


def _newest_whole(folder: Path, steps: Iterable[int], notes: list[str]) -> Seal | None:
    """The first checkpoint of `steps` that is as it was written; `notes` gets what is wrong with those before it."""
    for step in steps:
        seal = files.read_seal(folder, step)
        problem = "its seal is missing or damaged" if seal is None else files.damage(folder, seal)
        if problem is None:
            return seal
        notes.append(f"the checkpoint of step {step} is passed over: {problem}")
    return None


def own_points(spec: JobSpec, start: int, last: int) -> dict[int, int]:
    """The points of a replay, each with the step after which its mean begins."""
    every = (spec.log_steps, spec.checkpoint.every_steps)
    return _begins([s for s in range(start + 1, last + 1) if s == last or any(s % n == 0 for n in every)], start)


def _begins(steps: Sequence[int], start: int) -> dict[int, int]:
    return dict(zip(steps, [start, *steps], strict=False))
