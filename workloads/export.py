"""The newest checkpoint of a run -> its artifact."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from workloads import artifact, assemble, checkpoint
from workloads.data.columns import Manifest
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.inference import pngs
from workloads.methods.base import DRAWN, Method
from workloads.record import RunFolder
from workloads.sheet import contact_sheet
from workloads.spec import JobSpec

LOOKED_AT = 256  # images that the sheet of pictures may choose from


def export(spec: JobSpec, run: RunFolder, home: Path, job_id: str) -> artifact.Card:
    """Writes the artifact of the newest checkpoint into `run.artifact`."""
    cls, _ = assemble.method_of(spec)
    manifests = {name: assemble.open_stream(spec.data[name]) for name in cls.streams}
    first = manifests[cls.streams[0]]
    trained = spec.model_copy(update={"init": None})  # its weights would be loaded to be overwritten
    method = assemble.build_method(trained, assemble.data_info(spec, first), home)
    checkpoint.restore_weights(run.checkpoints, method)
    view = assemble.served_view(spec)
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
    method.eval()
    draws = cls.pictures is not Method.pictures
    sheet = _sheet(run, method, first, view) if draws or cls.sheet is not Method.sheet else None
    return artifact.write(run.artifact, method.export(), card, method if draws else None, sheet)


def _sheet(run: RunFolder, method: Method, manifest: Manifest, view: View) -> bytes | None:
    """What the method draws of a few random images, cropped in the middle; an error is an event, not worth the run."""
    n = DRAWN if type(method).sheet is Method.sheet else LOOKED_AT
    plain = View(size=view.size, mean=view.mean, std=view.std)
    try:
        batch = Reader(manifest, {"image": plain}, batch_size=min(n, len(manifest))).batch(0)
        with torch.inference_mode():
            drawn = method.sheet({"image": normalise(batch["image"], plain), "key": batch["key"]})
        return contact_sheet(pngs(drawn, plain))
    except Exception as error:
        run.event("pictures_failed", f"{type(error).__name__}: {error}")
        return None
