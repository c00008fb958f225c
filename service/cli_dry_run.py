"""What `manta submit --dry-run` prints."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from service.cli_estimate import GIB, activations
from service.terminal import show_json, show_table

Rows = list[tuple[str, Any]]


def show(found: dict[str, Any], as_json: bool) -> None:
    """A table of what a dry run answered, or its JSON."""
    if as_json:
        show_json(found)
        return
    rows = _searching(found) if "search" in found else _training(found)
    rows += [(f"samples of {name}", _number(n)) for name, n in found["samples"].items()]
    if found["eta_s"] is None:
        rows.append(("time", "no run of this shape has told it; --gpu H100 tells it by a peak"))
    else:
        rows.append(("time", f"{timedelta(seconds=round(found['eta_s']))} by {found['eta_from']}, once it has started"))
    rows += [("", note) for note in found.get("notes", ())]
    show_table(["of the job", found["name"]], rows)


def _training(found: dict[str, Any]) -> Rows:
    decode_s, cores = found["decode_s"], found["decode_cores"]
    decoding = "not measured" if decode_s is None else f"{decode_s:.3g} s of a core here for the samples of a step"
    return [
        ("method", found["method"]),
        ("parameters", f"{found['parameters'] / 1e6:,.3f} M, {found['trained'] / 1e6:,.3f} M of them trained"),
        ("a step", _tera(found["step_flops"])),
        ("the job", _tera(found["flops"])),
        ("memory of a worker", f"{found['state_bytes'] / GIB:,.3f} GiB of weights, gradients and moments"),
        ("", activations(found["activation_bytes"])),
        ("steps", f"{_number(found['steps'])}, {_number(found['epoch_steps'])} an epoch"),
        ("decoding", decoding + ("" if cores is None else f": {cores} cores needed")),
    ]


def _searching(found: dict[str, Any]) -> Rows:
    least = found["least"]
    budget = [
        (f"budget of {name}", f"{bound:,}" + (f", the smallest has {least[name]:,.10g}" if name in least else ""))
        for name, bound in found["budget"].items()
        if not isinstance(bound, dict)
    ]
    if "latency" in found["budget"]:
        smallest = f", the smallest has {least['latency_ms']:.4g}" if "latency_ms" in least else ""
        budget.append(("budget of ms", f"{found['budget']['latency']['ms']:g}{smallest}"))
    return [("search", found["search"]), ("candidates", _number(found["candidates"])), *budget]


def _number(value: int | None) -> str:
    return "not known" if value is None else f"{value:,}"


def _tera(flops: int | None) -> str:
    return "FLOPs are not to be counted" if flops is None else f"{flops / 1e12:,.4g} TFLOP over all workers"
