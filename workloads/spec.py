"""JobSpec: the one description of a job that trains, shared by requests, recipes and runs.

What other jobs have in common with it is `BaseSpec`; `workloads.spec_any` reads jobs of any kind.

No torch in here: the service, the command line and a laptop without a GPU read a
spec in milliseconds. Names (of methods, models, evaluations) are resolved by
`workloads.catalog`; what can be found wrong without training is found by
`workloads.preflight`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from workloads.spec_training import (
    CheckpointPolicy,
    Engine,
    Guards,
    Optimizer,
    Resources,
    Schedule,
    Seconds,
    Strict,
)

JobName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._-]{0,62}$")]


class Named(BaseModel):
    """`{name: mae, mask_ratio: 0.5}`: a name of the catalog and the config of what it names."""

    model_config = ConfigDict(frozen=True, extra="allow")

    name: str

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


class Stream(Strict):
    """One dataset of a job, or a part of it.

    Attributes:
        shards: path, URL (`s3://`, `gs://`, `https://`), brace pattern (`train-{000000..000009}.tar`), or a list of
            them.
        epoch_samples: of `pipe:` sources, which cannot be counted: how many samples are called an epoch.
        num_classes: of `pipe:` sources.
        batch_size: of this stream, where it is not the job's.
        shuffle_window: about how many samples are mixed one by one; blocks are permuted over the whole set anyway.
        per_class: keep this many samples of each class, drawn by `subset_seed`.
        scores: a file that an evaluation such as `forgetting` wrote of these shards, for `keep`.
        keep: this share of the samples, the best by `scores`.
        max_bad_share: the job fails once more than this share of the samples is damaged or cannot be decoded.
    """

    shards: str | list[str]
    epoch_samples: int | None = Field(default=None, ge=1)
    num_classes: int = Field(default=0, ge=0)
    batch_size: int | None = Field(default=None, ge=1)
    shuffle_window: int = Field(default=16384, ge=1)
    per_class: int | None = Field(default=None, ge=1)
    subset_seed: int = Field(default=0, ge=0)
    scores: str | None = None
    keep: float | None = Field(default=None, gt=0, le=1)
    max_bad_share: float = Field(default=0.01, ge=0, le=1)

    @property
    def piped(self) -> bool:
        """Whether commands bring the samples, one after the other."""
        return any(one.startswith("pipe:") for one in ([self.shards] if isinstance(self.shards, str) else self.shards))

    @model_validator(mode="after")
    def _counted(self) -> Stream:
        if self.piped and self.epoch_samples is None:
            raise ValueError("got `pipe:` without epoch_samples, expected how many samples an epoch has; set it")
        if (self.scores is None) != (self.keep is None):
            raise ValueError(f"got scores={self.scores} with keep={self.keep}, expected both; say what share to keep")
        chosen = [name for name in ("per_class", "scores") if getattr(self, name) is not None]
        if self.piped and chosen:
            raise ValueError(f"got {chosen[0]} for `pipe:`, whose samples cannot be chosen; leave it out, or use files")
        if len(chosen) > 1:
            raise ValueError("got per_class and scores, expected one way to choose samples; leave one out")
        if not self.piped and (self.epoch_samples is not None or self.num_classes):
            raise ValueError("got epoch_samples or num_classes for files, which are counted; leave them out")
        return self


JobReference = Annotated[str, Field(pattern=r"^\$?[a-zA-Z0-9][a-zA-Z0-9._-]{0,79}$")]  # $name: in a list of jobs


class BaseSpec(Strict):
    """What every job has."""

    name: JobName
    data: dict[str, Stream]
    init: str | None = (
        None  # weights to start from: name@version, job:<id>, timm:<name>, a folder or a .safetensors file
    )
    max_duration: Seconds | None = Field(default=None, gt=0)  # of the work itself, over all attempts; "12h"
    after: list[JobReference] = []  # of the service: ids of jobs that must have succeeded before this one starts
    priority: Literal["low", "normal", "high"] = "normal"  # of the service: its place in the queue
    seed: int = Field(default=0, ge=0, lt=2**31)
    resources: Resources = Resources()

    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True, serialize_by_alias=True)

    @property
    def about(self) -> tuple[str, str]:
        """What it does, as the catalog has it: the kind, and the name."""
        raise NotImplementedError(f"{type(self).__name__} must define about")

    def absolute(self, base: Path) -> Self:
        """The spec with relative paths (shards and scores, `init`, tables, the mirror) taken from `base`."""
        document = self.model_dump()
        if self.init is not None and ("/" in self.init or self.init.endswith(".safetensors")):
            document["init"] = self.init if self.init.startswith("timm:") else str(base / self.init)
        for holder in self._holders(document):
            streams = holder.get("data")
            for stream in streams.values() if isinstance(streams, dict) else ():  # of an evaluation it may be anything
                for field in ("shards", "scores"):
                    if isinstance(stream, dict) and field in stream:
                        stream[field] = _absolute(stream[field], base)
        return type(self).model_validate(document)

    def _holders(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        """Parts of the document with a `data` of streams."""
        return [document]


class JobSpec(BaseSpec):
    """A job that trains: what a request, a recipe and a run have in common.

    `model` is a name of the catalog or of timm; `job:<id>` or an artifact folder is the network of that job, or what it
    found (`workloads.winner`).
    """

    method: Named
    model: Named
    epochs: float | None = Field(default=None, gt=0)
    steps: int | None = Field(default=None, ge=1)
    batch_size: int = Field(default=256, ge=1)  # global, whatever the number of workers
    micro_batch_size: int | None = Field(default=None, ge=1)  # a worker's share at a time; None: all of it
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    engine: Engine = Engine()
    log_steps: int = Field(default=10, ge=1)  # that a point of the curve stands for
    guards: Guards = Guards()
    checkpoint: CheckpointPolicy = CheckpointPolicy()
    evaluate: list[Named] = []
    register_as: JobName | None = Field(default=None, alias="register")

    @field_validator("data")
    @classmethod
    def _some_stream(cls, data: dict[str, Stream]) -> dict[str, Stream]:
        if not data:
            raise ValueError("got no stream, expected at least `train`; write data: {train: {shards: ...}}")
        return data

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        if (self.epochs is None) == (self.steps is None):
            raise ValueError(
                f"got epochs={self.epochs} and steps={self.steps}, expected exactly one of them; set the length once"
            )
        workers = self.resources.max_workers
        if self.batch_size % workers:
            raise ValueError(
                f"got batch_size={self.batch_size} for {workers} workers, expected a multiple; "
                f"use {self.batch_size // workers * workers or workers}"
            )
        share = self.batch_size // workers
        if self.micro_batch_size is not None and share % self.micro_batch_size:
            raise ValueError(
                f"got micro_batch_size={self.micro_batch_size} for a worker's share of {share}, expected a divisor; "
                f"use {next(d for d in range(min(self.micro_batch_size, share), 0, -1) if share % d == 0)}"
            )
        parts = self._micro_batches
        for name, stream in self.data.items():
            if stream.batch_size is not None and stream.batch_size % parts:
                raise ValueError(
                    f"got data.{name}.batch_size={stream.batch_size} for {parts} micro-batches of a step, expected a "
                    f"multiple; use {max(1, stream.batch_size // parts) * parts}"
                )
        return self

    @property
    def _micro_batches(self) -> int:
        """Of a step, over all workers."""
        return self.batch_size // (self.micro_batch_size or self.batch_size // self.resources.max_workers)

    def batch_size_of(self, stream: str) -> int:
        """Global batch size of a stream."""
        return self.data[stream].batch_size or self.batch_size

    def ranks_among(self, workers: int) -> int:
        """How many of `workers` train: the most that share the micro-batches evenly; the others stand by."""
        return next(n for n in range(workers, 0, -1) if self._micro_batches % n == 0)

    @property
    def about(self) -> tuple[str, str]:
        return "method", self.method.name

    def absolute(self, base: Path) -> Self:
        spec = super().absolute(base)
        if self.checkpoint.mirror is not None:
            policy = self.checkpoint.model_copy(update={"mirror": _absolute(self.checkpoint.mirror, base)})
            spec = spec.model_copy(update={"checkpoint": policy})
        if "/" in self.model.name:
            model = self.model.model_copy(update={"name": str(base / self.model.name)})
            spec = spec.model_copy(update={"model": model})
        return spec

    def _holders(self, document: dict[str, Any]) -> list[dict[str, Any]]:
        return [document, *document["evaluate"]]

    def accumulation_on(self, world_size: int) -> int:
        """Micro-batches for each optimizer step of one of `world_size` ranks.

        The size of a micro-batch is that of the job's largest number of workers, so that a run
        on fewer ranks computes the same numbers in more of them.
        """
        assert self._micro_batches % world_size == 0, (self._micro_batches, world_size)
        return self._micro_batches // world_size


def _absolute(shards: Any, base: Path) -> Any:
    if isinstance(shards, list):
        return [_absolute(one, base) for one in shards]
    if not isinstance(shards, str):
        return shards
    return shards if "://" in shards or shards.startswith("pipe:") else str(base / shards)
