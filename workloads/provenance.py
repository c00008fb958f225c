"""What a run was made of, so that it can be made again: spec, data, code, packages, machine.

`<run>/provenance.json` holds a list, oldest first: one entry for each time that an attempt started in another
environment than the one before it. Nothing that it names is imported for it.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from workloads.record import RunFolder, write_atomic
from workloads.spec import JobSpec

if TYPE_CHECKING:
    import torch

    from workloads.data.manifest import Manifest

DECODERS = ("simplejpeg", "pillow", "av", "nibabel")
PACKAGES = ("torch", "ray", "timm", "numpy", "pyarrow", "webdataset", *DECODERS)  # their versions change results
GIT_TIMEOUT_S = 2.0  # a checkout on a slow network disk must not hold a job up


def provenance(spec: JobSpec, device: torch.device, manifests: Mapping[str, Manifest] | None = None) -> dict[str, Any]:
    """Facts that two runs with equal results have in common, as JSON values; takes tens of milliseconds.

    Args:
        spec: the job.
        device: what this process trains on.
        manifests: of the streams, as they were opened.
    """
    datasets = {
        name: {"samples": len(manifest), "content_hash": manifest.content_hash}
        for name, manifest in (manifests or {}).items()
    }
    return {
        "spec": spec.model_dump(mode="json"),
        "seed": spec.seed,
        "datasets": datasets,
        "code": {"version": _version("manta"), **_commit(Path(__file__).parent)},
        "packages": {name: _version(name) for name in PACKAGES},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": _device(device),
    }


def difference(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What `b` has different from `a`, a sentence each; [] where results may be expected to be equal."""
    before, now = dict(_leaves(a)), dict(_leaves(b))
    told = []
    for name in [*before, *(name for name in now if name not in before)]:
        old, new = (json.dumps(side[name]) if name in side else "nothing" for side in (before, now))
        if old != new:
            told.append(f"{name} was {old}, is {new}")
    if before.get("code.dirty") and now.get("code.dirty"):
        told.append("code had changes that are not committed, then and now: they may differ")
    return told


def read(run: RunFolder) -> list[dict[str, Any]]:
    """All entries of a run, oldest first; [] where none was kept."""
    try:
        entries: list[dict[str, Any]] = json.loads(run.provenance.read_text())
    except FileNotFoundError:
        return []
    return entries


def keep(run: RunFolder, facts: dict[str, Any]) -> list[str]:
    """Adds `facts` to the run unless its newest entry says the same; returns how it differs from that one."""
    entries = read(run)
    if entries and entries[-1] == facts:
        return []
    write_atomic(run.provenance, json.dumps([*entries, facts], indent=1))
    return difference(entries[-1], facts) if entries else []


def _leaves(tree: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """("packages.torch", "2.13.0"), ...: an empty or plain value is a leaf, so are lists of plain values."""
    items: list[tuple[Any, Any]] = []
    if isinstance(tree, Mapping):
        items = list(tree.items())
    elif isinstance(tree, list) and any(isinstance(one, Mapping | list) for one in tree):
        items = list(enumerate(tree))
    if not items:
        yield name, tree
    for key, value in items:
        yield from _leaves(value, f"{name}.{key}" if name else str(key))


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _commit(package: Path) -> dict[str, Any]:
    """Commit of the checkout that `package` lies in, and whether the package was changed since.

    Only a checkout with the package at its top counts: an installed package may lie in a virtual environment inside
    of somebody else's repository. None where there is no checkout, or git does not answer.
    """
    nothing: dict[str, Any] = {"commit": None, "dirty": None}
    if not (package.parent / ".git").exists():
        return nothing
    # In a hook git sets GIT_DIR and the like, which would win over -C.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    command = ["git", "--no-optional-locks", "-C", str(package.parent), "status", "--porcelain=v2", "--branch"]
    try:
        status = subprocess.run(
            [*command, "--", package.name],
            capture_output=True,
            text=True,
            timeout=GIT_TIMEOUT_S,
            env=environment,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return nothing
    lines = status.stdout.splitlines()
    commits = (line.split()[2] for line in lines if line.startswith("# branch.oid "))
    return {"commit": next(commits, None), "dirty": any(not line.startswith("#") for line in lines)}


def _device(device: torch.device) -> dict[str, Any]:
    """Name and how many of them this process sees; for a CPU also the threads, as sums depend on their number."""
    import torch

    if device.type == "cuda":
        return {
            "type": "cuda",
            "name": torch.cuda.get_device_name(device),
            "count": torch.cuda.device_count(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
        }
    return {"type": device.type, "name": _cpu(), "count": os.cpu_count(), "threads": torch.get_num_threads()}


def _cpu() -> str:
    """Linux has the model's name in /proc; elsewhere the architecture must do."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
