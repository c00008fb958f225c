"""What a job would cost, without its data and without a device: parameters, arithmetic, memory.

The method is built on the meta device and makes one step there: so a job that cannot start fails here, in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from workloads import assemble
from workloads.data.views import View, height_width
from workloads.flops import LATER, count
from workloads.methods.base import Batch, DataInfo, Method
from workloads.parallel import BYTES_OF_STATE
from workloads.spec import JobSpec


@dataclass(frozen=True)
class Group:
    """Parameters that are trained alike."""

    parameters: int
    lr_scale: float
    weight_decay: float


@dataclass(frozen=True)
class Estimate:
    """Of a job on its largest number of workers.

    Attributes:
        parameters: of the method, trained or not; teachers are not among them.
        groups: what is trained and how.
        flops: of an optimizer step over all workers, forward and backward; None where shapes alone do not say.
        state_bytes: of a worker: weights, and gradients and two moments of what is trained, in float32, not sharded.
        activation_bytes: of a worker: what a micro-batch keeps for backward, in the job's precision, nothing being
            computed again. An upper bound: fused kernels keep less. None where `flops` is.
        steps: of the whole job; None where neither the job nor the caller says how many samples there are.
    """

    parameters: int
    groups: list[Group]
    flops: int | None
    state_bytes: int
    activation_bytes: int | None
    steps: int | None

    @property
    def trained(self) -> int:
        return sum(group.parameters for group in self.groups)

    def device_hours(self, peak: float, utilisation: float) -> float | None:
        """Hours of one device for all steps.

        Args:
            peak: FLOP/s of a device (`flops.peak_of`).
            utilisation: share of the peak that is reached.
        """
        if self.flops is None or self.steps is None:
            return None
        return self.flops * self.steps / (peak * utilisation) / 3600


def estimate(spec: JobSpec, home: Path, *, samples: int | None = None, num_classes: int = 1000) -> Estimate:
    """Builds the method of a job and makes a step of it, without values.

    Args:
        spec: the job; its shards are not opened.
        home: where teachers and initial weights are looked up.
        samples: of an epoch; needed for `steps` where the job is given in epochs.
        num_classes: of its labels.

    Raises:
        ValueError: a name, a size or a reference that does not fit.
    """
    size = height_width(assemble.image_size(spec))
    info = DataInfo(num_instances=samples or spec.batch_size, num_classes=num_classes, shape=(3, *size))
    with torch.device("meta"):
        method = assemble.build_method(spec.model_copy(update={"init": None}), info, home)
    groups = [
        Group(
            sum(parameter.numel() for parameter in group["params"]),
            float(group.get("lr_scale", 1.0)),
            float(spec.optimizer.weight_decay if group.get("weight_decay") is None else group["weight_decay"]),
        )
        for group in method.parameter_groups()
        if group["params"]
    ]
    parameters = sum(parameter.numel() for parameter in method.parameters())
    trained = sum(group.parameters for group in groups)
    parts = spec.accumulation_on(1)
    batch = _batch(spec, spec.batch_size // parts)
    flops = count(method, batch, LATER)
    steps = spec.steps
    if steps is None and samples is not None:
        steps = round((spec.epochs or 0) * (samples // spec.batch_size))
    return Estimate(
        parameters=parameters,
        groups=groups,
        flops=None if flops is None else flops * parts,
        state_bytes=BYTES_OF_STATE * trained + 4 * (parameters - trained),
        activation_bytes=None if flops is None else _kept(method, batch) // (1 if spec.precision == "fp32" else 2),
        steps=steps,
    )


def _batch(spec: JobSpec, n: int) -> Any:
    """A micro-batch of images, or volumes of one channel, as the method gets it, on meta; one for each stream."""
    from workloads.data.transforms.volume import VolumeView  # nibabel costs what it costs only here

    views = assemble.views_of(spec)
    cls, _ = assemble.method_of(spec)
    batch: Batch = {
        name: torch.empty(n, 3, *height_width(view.size), device="meta")
        for name, view in views.items()
        if isinstance(view, View)
    }
    for name, view in views.items():
        if isinstance(view, VolumeView):
            batch[name] = torch.empty(n, 1, *view.size, device="meta")
            batch[f"{name}_geometry"] = torch.empty(n, 5, 3, dtype=torch.float64, device="meta")
    batch |= {name: torch.empty(n, dtype=torch.int64, device="meta") for name in ("index", "key", "label")}
    return batch if len(cls.streams) == 1 else dict.fromkeys(cls.streams, batch)


def _kept(method: Method, batch: Any) -> int:
    """Bytes that autograd keeps of a forward in float32: each storage once, parameters not."""
    own = {parameter.untyped_storage()._cdata for parameter in method.parameters()}
    held: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        held.setdefault(tensor.untyped_storage()._cdata, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = method(batch, LATER).loss
        return 0 if loss is None else sum(t.untyped_storage().nbytes() for c, t in held.items() if c not in own)
