"""What a job would do and cost, said before it is submitted: its data are counted, a few samples decoded, nothing kept.

`workloads.estimate` needs no data; this looks at those of the job, and so finds what is wrong with them too.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, computed_field

from workloads import assemble, catalog
from workloads.data.manifest import DataError, Manifest, count
from workloads.data.reader import Reader
from workloads.estimate import estimate
from workloads.preflight import Problem
from workloads.search.base import SearchInputs
from workloads.spec import JobSpec
from workloads.spec_any import AnySpec
from workloads.spec_search import SearchSpec
from workloads.train import total_steps
from workloads.winner import settled

DECODED = 16  # samples of each stream, whose time is taken; as many before them warm it up


class Refused(ValueError):
    """The job cannot run, which the cheaper checks of `workloads.preflight` did not see."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(str(problem))
        self.problem = problem


class Training(BaseModel):
    """Of a job that trains, on its largest number of workers.

    Attributes:
        parameters: of the method, trained or not.
        trained: those that are.
        step_flops: of an optimizer step over all workers; None where shapes alone do not say.
        state_bytes: of a worker: weights, gradients, moments.
        activation_bytes: of a worker, at most; None where `step_flops` is.
        samples: of each stream; None where the shards have no manifest yet and a scan would take long.
        epoch_steps: of a pass over the first stream.
        steps: in all.
        decode_s: of one core of this machine, for the samples of a step; None where none could be read cheaply.
        notes: what could not be said, and why.
    """

    parameters: int
    trained: int
    step_flops: int | None
    state_bytes: int
    activation_bytes: int | None
    samples: dict[str, int | None]
    epoch_steps: int | None
    steps: int | None
    decode_s: float | None
    notes: list[str]

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops(self) -> int | None:
        """Of the whole job."""
        return None if self.step_flops is None or self.steps is None else self.step_flops * self.steps


class Searching(BaseModel):
    """Of a search.

    Attributes:
        candidates: that are asked for, over all islands; those over budget are drawn but not scored.
        budget: the most that a winner may cost.
        least: what the smallest network of the space costs, by the names of the budget; {} where nobody knows.
        samples: of each stream, as for a training.
    """

    candidates: int
    budget: dict[str, Any]
    least: dict[str, float]
    samples: dict[str, int | None]


def dry_run(spec: AnySpec, home: Path) -> Training | Searching:
    """Says what a job would do.

    Args:
        spec: a job in which `workloads.preflight` found nothing wrong.
        home: where references to weights are looked up.

    Raises:
        Refused: its data, or how method and data go together.
    """
    spec = settled(spec, home)
    manifests = {name: _manifest(spec, name) for name in spec.data}
    samples = {name: None if manifest is None else len(manifest) for name, manifest in manifests.items()}
    if isinstance(spec, SearchSpec):
        return _searching(spec, samples)
    notes = [
        f"{name}: the shards have no manifest yet; `manta inspect` makes it" for name, n in samples.items() if n is None
    ]
    known = {name: manifest for name, manifest in manifests.items() if manifest is not None}
    cls = catalog.load("method", spec.method.name)
    first = known.get(cls.streams[0])
    epoch_steps, decode_s = _read(spec, known) if len(known) == len(manifests) else (None, None)
    steps = spec.steps if epoch_steps is None else total_steps(spec, epoch_steps)
    try:
        facts = {} if first is None else {"samples": len(first), "num_classes": first.num_classes}
        cost = estimate(spec, home, **facts)
    except ValueError as error:
        raise Refused(Problem(loc=["method"], message=str(error))) from error
    if cost.flops is None:
        notes.append("FLOPs and memory of activations are not to be counted without values")
    return Training(
        parameters=cost.parameters,
        trained=cost.trained,
        step_flops=cost.flops,
        state_bytes=cost.state_bytes,
        activation_bytes=cost.activation_bytes,
        samples=samples,
        epoch_steps=epoch_steps,
        steps=steps,
        decode_s=decode_s,
        notes=notes,
    )


def _manifest(spec: AnySpec, name: str) -> Manifest | None:
    stream = spec.data[name]
    try:
        manifest = assemble.open_stream(stream) if stream.piped else count(stream.shards)
        return manifest if manifest is None or stream.piped else assemble.chosen(stream, manifest)
    except (DataError, OSError) as error:
        raise Refused(Problem(loc=["data", name], message=str(error))) from error


def _read(spec: JobSpec, manifests: Mapping[str, Manifest]) -> tuple[int, float | None]:
    """Steps of an epoch, and seconds of a core for the samples of a step: the second of two small shares is timed."""
    name, taken = "", 0.0
    try:
        readers = assemble.readers_of(spec, dict(manifests))
        for name, reader in readers.items():
            size = spec.batch_size_of(name)
            if isinstance(reader, Reader):
                shares = max(1, size // DECODED)
                reader.batch(0, 0, shares)
                began = time.thread_time()
                batch = reader.batch(0, shares - 1, shares)
                taken += (time.thread_time() - began) / len(batch["index"]) * size
    except (DataError, OSError) as error:
        raise Refused(Problem(loc=["data", name] if name else ["data"], message=str(error))) from error
    first = readers[catalog.load("method", spec.method.name).streams[0]]
    return first.steps_per_epoch, taken or None


def _searching(spec: SearchSpec, samples: dict[str, int | None]) -> Searching:
    cls = catalog.load("search", spec.search.name)
    config = cls.Config.model_validate(spec.search.config)
    return Searching(
        candidates=cls(config, SearchInputs(spec.seed)).total * spec.islands,
        budget=config.model_dump(mode="json", exclude_none=True).get("budget", {}),
        least={name: float(value) for name, value in config.least().items()},
        samples=samples,
    )
