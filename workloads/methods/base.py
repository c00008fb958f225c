"""The interface of a method: one paper, one file, one class.

A method is told everything it may use (`Inputs`), says as data what it looks at
(`views`), and is otherwise an `nn.Module` whose forward is the loss of one
micro-batch. Its state is parameters and persistent buffers under one name;
schedules are functions of `Progress`; randomness comes from the sample
(`batch["key"]`, see `workloads.data.keys`) or from torch's generators, which the
loop seeds from (seed, step, micro-batch, rank). So a resumed run has nothing else to restore, and
two ranks compute what one would.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TypeAlias

from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from workloads.data.modalities import Views
from workloads.data.samplers import SamplerConfig
from workloads.data.views import Size, View
from workloads.parts.frozen import Frozen

Batch: TypeAlias = dict[str, Any]
"""One collated batch. That of an image stream holds:

NAME: [B, 3, H, W] for each view NAME of `Method.views`; uint8 from the reader, normalised floats for the method.
NAME_geometry: float64 [B, 8], where that view lies in the image: `Geometry.unpacked` of `data.transforms.image`.
Views of other modalities bring what `data.modalities.collate` says.
index: int64 [B], the row in the manifest.
key: int64 [B], a random key of (seed, epoch, index).
label: int64 [B], -1 where there is none.
"""


DRAWN = 8  # images in a row of the picture that is kept


class MethodConfig(BaseModel):
    """Beside its user, frozen; a typo in a job is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


@dataclass(frozen=True)
class DataInfo:
    """Facts of the manifest that modules may be sized by."""

    num_instances: int
    num_classes: int
    shape: tuple[int, ...]  # of one view: (C, H, W)
    indexed: bool = True  # whether `index` names the same sample in each epoch; that of `pipe:` does not

    def expect_index(self) -> None:
        """Refuses data of which a method cannot know a sample again.

        Raises:
            ValueError: samples come by `pipe:`.
        """
        if not self.indexed:
            raise ValueError(
                "got `pipe:`, which numbers samples as they come, expected files, whose samples are known again in the "
                "next epoch; write shards"
            )

    @property
    def side(self) -> int:
        """Of a square view, in pixels.

        Raises:
            ValueError: it is not square.
        """
        height, width = self.shape[-2:]
        if height != width:
            raise ValueError(f"got image_size=[{height}, {width}], expected a square; this method knows no others")
        return height

    def expect_labels(self) -> None:
        """Refuses data that a method cannot learn classes from.

        Raises:
            ValueError: there are fewer than two.
        """
        if self.num_classes < 2:
            raise ValueError(
                f"got data with {self.num_classes} classes, expected labels of 2 or more; "
                "add a .cls member to each sample (`manta pack` does)"
            )


@dataclass(frozen=True)
class Progress:
    """Schedules are functions of it: a resumed run has no counter to restore."""

    step: int  # optimizer steps done before this one
    epoch: int
    total_steps: int


def _nothing(reference: str) -> Frozen:
    raise ValueError(f"got {reference!r}, expected a method that is given its whole teacher")


@dataclass(frozen=True)
class Inputs:
    """All that a job hands over; teachers and inner methods come by name."""

    encoder: nn.Module
    data: DataInfo
    load: Callable[[str], Frozen]  # "name@version", "job:<id>", a folder or "timm:<name>" -> what it exported
    build: Callable[[dict[str, Any]], Method]  # {"name": ..., **config} -> another method on the same inputs
    restore: Callable[[str], Frozen] = _nothing  # an artifact that reconstructs -> its whole trained method


@dataclass(frozen=True)
class Output:
    loss: Tensor | None  # None: nothing to differentiate (a memory being filled)
    metrics: dict[str, Tensor] = field(default_factory=dict)


class Scan(Protocol):
    """Walks the data in its order, without gradients."""

    def __call__(self, stream: str, through: Views | None = None, rows: range | None = None) -> Iterator[Batch]:
        """Batches that hold these rows, and some before and after them.

        There are equally many for equally many rows, so that ranks which meet in a forward take equally many steps.

        Args:
            stream: of the job's data.
            through: other views than those of the method.
            rows: of the manifest; None: all.
        """


class Method(nn.Module):
    """One paper, one file. State is parameters and persistent buffers; nothing else survives a restart."""

    Config: ClassVar[type[MethodConfig]]
    paper: ClassVar[str]  # "MAE, He et al. 2022, arXiv 2111.06377"
    streams: ClassVar[tuple[str, ...]] = ("train",)  # two or more: a batch is a dict of batches
    exports: ClassVar[str] = "encoder"  # or "classifier": what `export` returns, hence what can be served

    def __init__(self, config: Any, inputs: Inputs) -> None:
        super().__init__()
        self.config = config

    @classmethod
    def views(cls, config: Any, image_size: Size) -> Views:
        """What the method looks at, as data: geometry is executed at decode, colours are changed in batches."""
        return {"image": View(size=image_size)}

    @classmethod
    def sampler(cls, config: Any) -> SamplerConfig | None:
        """Which samples make a batch of the first stream; None: a plain shuffle."""
        return None

    def forward(self, batch: Batch, progress: Progress) -> Output:
        """The loss of one micro-batch; named forward so that DDP, FSDP and compile see it."""
        raise NotImplementedError(f"{type(self).__name__} must define forward(batch, progress)")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What is trained and how: dicts of `params`, `lr_scale` (default 1), `weight_decay` (default: the job's).

        The default trains every parameter that requires a gradient; 1-D parameters (biases, norms) do not decay.
        """
        decay: list[nn.Parameter] = []
        no_decay: list[nn.Parameter] = []
        for parameter in self.parameters():
            if parameter.requires_grad:
                (no_decay if parameter.ndim <= 1 else decay).append(parameter)
        return [{"params": decay}, {"params": no_decay, "weight_decay": 0.0}]

    def after_step(self, progress: Progress) -> None:
        """Once per optimizer step: EMA, masks, norms (in forward it would run per micro-batch)."""

    def after_epoch(self, progress: Progress, scan: Scan) -> None:
        """Once per pass: re-cluster, grow, prune; `scan` walks the data."""

    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """Optional: reconstructions, masks, attention, each [B, 3, H, W] in the range of the normalised input."""
        return {}

    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """Optional: rows of the picture that the artifact keeps, out of some hundred images; each [n, 3, H, W]."""
        return self.pictures({name: batch[name][:DRAWN] for name in ("image", "key")})

    def export(self) -> nn.Module:
        """What is evaluated, registered and served."""
        raise NotImplementedError(f"{type(self).__name__} must define export()")
