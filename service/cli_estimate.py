"""`manta estimate`: what a job would cost, before its data are there."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from service.terminal import USAGE, AsJson, Spec, fail, out, read_job, show_json, show_table

GIB = 2**30


def activations(size: int | None) -> str:
    return "activations are not to be counted" if size is None else f"at most {size / GIB:,.2f} GiB of activations"


def estimate(
    spec: Spec,
    samples: Annotated[int | None, typer.Option(min=1, help="Of an epoch, such as 1281167 of ImageNet-1k.")] = None,
    gpu: Annotated[str, typer.Option(help="As its driver names it; its peak is known from data sheets.")] = "H100",
    utilisation: Annotated[float, typer.Option(min=0.01, max=1, help="Share of the peak that is reached.")] = 0.4,
    as_json: AsJson = False,
) -> None:
    """Says what a job would cost: parameters, FLOPs and memory of a step, hours; a job that cannot start fails."""
    from service.local_cluster import default_home
    from workloads.estimate import estimate as of
    from workloads.flops import peak_of
    from workloads.spec import JobSpec
    from workloads.winner import settled

    try:
        document = settled(read_job(spec), default_home())
    except ValueError as error:
        fail(error)
    if not isinstance(document, JobSpec):
        fail(f"got {spec}, a search, expected a job that trains; what candidates cost is what the search counts", USAGE)
    peak = peak_of(gpu, document.precision)
    if peak is None:
        fail(f"got --gpu {gpu!r}, whose peak in {document.precision} is not known, expected one such as A100 or H100")
    try:
        found = of(document, default_home(), samples=samples)
    except ValueError as error:
        fail(error)
    hours = found.device_hours(peak, utilisation)
    if as_json:
        show_json({**asdict(found), "trained": found.trained, "hours": hours})
        return
    rows = [
        ("parameters", f"{found.parameters / 1e6:,.1f} M, {found.trained / 1e6:,.1f} M of them trained"),
        ("a step", "not to be counted" if found.flops is None else f"{found.flops / 1e12:,.2f} TFLOP over all workers"),
        ("memory of a worker", f"{found.state_bytes / GIB:,.2f} GiB of weights, gradients and moments"),
        ("", activations(found.activation_bytes)),
        ("steps", "give --samples" if found.steps is None else f"{found.steps:,}"),
        (f"hours of one {gpu} at {utilisation:.0%}", "" if hours is None else f"{hours:,.1f}"),
    ]
    show_table(["of the job", Path(spec).name], rows)
    decays = sorted({(group.lr_scale, group.weight_decay) for group in found.groups})
    out.print(f"{len(decays)} kinds of parameters: (rate x, weight decay) {', '.join(map(str, decays))}")
