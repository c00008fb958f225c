"""How a job trains: the parts of a JobSpec that the engine reads. No torch in here."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Strict(BaseModel):
    """Frozen, and a typo is an error rather than a default; so is a number that is not finite."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


def _seconds(value: object) -> object:
    """`90`, `"30m"`, `"1d 12h"` -> seconds."""
    if not isinstance(value, str) or value.isdigit():
        return value
    parts = re.findall(r"(\d+(?:\.\d+)?)\s*([smhd])", value)
    if not parts or re.sub(r"(\d+(?:\.\d+)?)\s*([smhd])", "", value).strip():
        raise ValueError(f'got {value!r}, expected seconds or a text such as "30m", "12h", "1d 6h"')
    return sum(float(number) * _UNIT_S[unit] for number, unit in parts)


Seconds = Annotated[float, BeforeValidator(_seconds, json_schema_input_type=float | str)]


def _free(name: str) -> str:
    """Ray has names of its own, and `node:` and `accelerator_type:` before a colon."""
    if not re.fullmatch(r"[A-Za-z][\w.-]*", name) or name in ("CPU", "GPU", "memory", "object_store_memory", "bundle"):
        raise ValueError(
            f"got {name} as a custom resource, expected a name that Ray does not use: letters, digits, _.-"
        )
    return name


def _countable(amount: float) -> float:
    """Ray gives out parts of one, and whole ones."""
    if amount > 1 and not amount.is_integer():
        raise ValueError(f"got {amount:g} of a custom resource, expected a part of one or a whole number; round it")
    return amount


class Optimizer(Strict):
    """The rule of the weights.

    Attributes:
        name: adamw (Loshchilov and Hutter 2019), sgd, lars (You et al. 2017), lamb (You et al. 2020).
        lr: of the groups with scale 1.
        weight_decay: of the groups that do not say; decoupled in adamw and lamb, added to the gradient in sgd and lars.
        betas: of adamw and lamb.
        momentum: of sgd and lars.
        nesterov: of sgd.
        trust_coefficient: of lars.
        scale_lr: multiply lr by batch_size / 256.
        clip_grad_norm: the longest gradient, of all parameters together.
        clip_parameter_norm: the longest gradient of each parameter by itself (DINO).
    """

    name: Literal["adamw", "sgd", "lars", "lamb"] = "adamw"
    lr: float = Field(default=1.5e-4, gt=0)
    weight_decay: float = Field(default=0.05, ge=0)
    betas: tuple[float, float] = (0.9, 0.95)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    nesterov: bool = False
    trust_coefficient: float = Field(default=0.001, gt=0)
    scale_lr: bool = False
    clip_grad_norm: float | None = Field(default=None, gt=0)
    clip_parameter_norm: float | None = Field(default=None, gt=0)


class Schedule(Strict):
    """Learning rate and weight decay by step: linear warm-up from 0, then `name`.

    Attributes:
        name: cosine: half a cosine down to `min_lr`; step: times `gamma` at each of `milestones`; constant.
        warmup_epochs: may be a fraction.
        min_lr: where the cosine ends.
        milestones: of step, in epochs.
        gamma: of step.
        weight_decay_end: where a cosine from `optimizer.weight_decay` ends; None: it stays.
    """

    name: Literal["cosine", "step", "constant"] = "cosine"
    warmup_epochs: float = Field(default=0, ge=0)
    min_lr: float = Field(default=0, ge=0)
    milestones: tuple[float, ...] = ()
    gamma: float = Field(default=0.1, gt=0)
    weight_decay_end: float | None = Field(default=None, ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Schedule:
        if (self.name == "step") != bool(self.milestones):
            raise ValueError(
                f"got schedule {self.name} with milestones {list(self.milestones)}, expected them with `step` and "
                "nothing else; name the epochs of the steps, or leave them out"
            )
        if list(self.milestones) != sorted(set(self.milestones)):
            raise ValueError(f"got milestones {list(self.milestones)}, expected growing epochs; sort them")
        return self


class Resources(Strict):
    """What a job runs on.

    Attributes:
        workers: processes that train; [least, most]: as many as there is room for, joined and left while it runs.
        cpus_per_worker: cores of each.
        gpus_per_worker: GPUs of each.
        custom_per_worker: of each, of what only some nodes give out: `{h100: 1}`; a part of one, or whole ones. The
            process of a job that trains in one process takes it itself.
        loader_workers: processes of each that read and decode; 0: a thread of the worker itself.
    """

    workers: Annotated[int, Field(ge=1)] | tuple[Annotated[int, Field(ge=1)], Annotated[int, Field(ge=1)]] = 1
    cpus_per_worker: int = Field(default=1, ge=1)
    gpus_per_worker: float = Field(default=0, ge=0)
    custom_per_worker: dict[
        Annotated[str, AfterValidator(_free)], Annotated[float, Field(gt=0), AfterValidator(_countable)]
    ] = {}
    loader_workers: int = Field(default=0, ge=0)

    @model_validator(mode="after")
    def _ordered(self) -> Resources:
        if self.min_workers > self.max_workers:
            raise ValueError(f"got workers={list(self.workers)}, expected [least, most]; swap them")  # type: ignore[arg-type]
        return self

    @property
    def min_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[0]

    @property
    def max_workers(self) -> int:
        return self.workers if isinstance(self.workers, int) else self.workers[1]

    @property
    def cpus(self) -> int:
        """What the job needs to start."""
        return self.min_workers * self.cpus_per_worker

    @property
    def gpus(self) -> float:
        return self.min_workers * self.gpus_per_worker

    @property
    def most_gpus(self) -> float:
        """What it may grow to."""
        return self.max_workers * self.gpus_per_worker

    @property
    def custom(self) -> dict[str, float]:
        return {name: self.min_workers * each for name, each in self.custom_per_worker.items()}

    @property
    def of_one(self) -> dict[str, float]:
        """What a worker holds, by the names of Ray."""
        gpus = {"GPU": self.gpus_per_worker} if self.gpus_per_worker else {}
        return {"CPU": float(self.cpus_per_worker)} | gpus | self.custom_per_worker


class Engine(Strict):
    """How the work is done; nothing here changes what is learned, but for rounding.

    Attributes:
        strategy: ddp: each worker holds all; fsdp: weights, gradients and optimizer state are shared out; auto: fsdp
            when a GPU would not hold them three times over.
        compile: `torch.compile`; minutes at the start, faster steps on a GPU.
        activation_checkpointing: compute the blocks again in backward rather than keep what they computed.
        channels_last: memory format of weights and images; null: of networks of convolutions, which are
            faster so, on a CPU by about 10 %.
        sync_batchnorm: statistics of BatchNorm over all workers.
    """

    strategy: Literal["auto", "ddp", "fsdp"] = "auto"
    compile: bool = False
    activation_checkpointing: bool = False
    channels_last: bool | None = None
    sync_batchnorm: bool = True


class CheckpointPolicy(Strict):
    """When checkpoints are written, and which stay.

    Attributes:
        every_steps: between two of them.
        keep: the newest so many; where a guard has begun to count, the newest from before that stays too.
        keep_best: and so many of the best by `metric`, a name of the curve.
        metric: less is better, or more with `mode: max`.
        mode: of the metric.
        mirror: folder or `s3://` prefix that holds a copy of the log and those that stay, for nodes that share no disk:
            in a folder of this run there, by the id of the job, or the name of the `--out` of `manta run --local`.
    """

    every_steps: int = Field(default=500, ge=1)
    keep: int = Field(default=2, ge=1)
    keep_best: int = Field(default=0, ge=0)
    metric: str = "loss"
    mode: Literal["min", "max"] = "min"
    mirror: str | None = None


class Guards(Strict):
    """When a run is ended because it cannot come to anything.

    Attributes:
        max_skipped_steps: a step whose loss or gradient is not finite changes nothing; so many in a row end the job.
        divergence: the job ends when its loss is so many times the largest of its first points, three points in a
            row; None: never.
        min_feature_std: an encoder has collapsed when its features, at unit length, deviate by less (1 is as wide as
            they can be), at two checkpoints in a row; None: never.
        min_rankme: likewise when they span fewer directions (RankMe, Garrido et al. 2023): 1 is a line, wide as they
            may be on it. The default ends what is on a line to a thousandth, as that of `min_feature_std` ends what is
            in a point to a thousandth; healthy toy runs of the methods measured 1.6 at least.
        hang: a worker that makes no step for so long writes the stack of each thread and is started again.
    """

    max_skipped_steps: int = Field(default=10, ge=1)
    divergence: float | None = Field(default=10.0, gt=1)
    min_feature_std: float | None = Field(default=1e-3, gt=0, lt=1)
    min_rankme: float | None = Field(default=1.01, gt=1)
    hang: Seconds | None = Field(default=1800.0, gt=0)
