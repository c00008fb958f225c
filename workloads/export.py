"""The newest checkpoint of a run -> its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from workloads import artifact, assemble, checkpoint
from workloads.data.views import View
from workloads.methods.base import Method
from workloads.record import RunFolder
from workloads.spec import JobSpec


def export(spec: JobSpec, run: RunFolder, home: Path, job_id: str) -> artifact.Card:
    """Writes the artifact of the newest checkpoint into `run.artifact`."""
    cls, _ = assemble.method_of(spec)
    manifests = {name: assemble.open_stream(spec.data[name]) for name in cls.streams}
    first = manifests[cls.streams[0]]
    trained = spec.model_copy(update={"init": None})  # its weights would be loaded to be overwritten
    method = assemble.build_method(trained, assemble.data_info(spec, first), home)
    checkpoint.restore_weights(run.checkpoints, method)
    view = next(view for view in assemble.views_of(spec).values() if isinstance(view, View))
    card: dict[str, Any] = {
        "kind": cls.exports,
        "job_id": job_id,
        "spec": spec,
        "paper": cls.paper,
        "classes": first.classes,
        "image_size": view.size,
        "mean": view.mean,
        "std": view.std,
        "num_instances": len(first),
        "datasets": {n: {"samples": len(m), "content_hash": m.content_hash} for n, m in manifests.items()},
    }
    draws = cls.pictures is not Method.pictures
    return artifact.write(run.artifact, method.eval().export(), card, method if draws else None)
