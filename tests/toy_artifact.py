"""Artifacts with random weights, made without a job."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from workloads import artifact
from workloads.methods.base import DataInfo, Inputs
from workloads.methods.mae import MAE, MAEConfig
from workloads.models.encoders import build_encoder, classifier_of
from workloads.spec import JobSpec

SIZE = 16
CLASSES = ["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]
VIT = {"name": "vit", "image_size": SIZE, "patch_size": 4, "dim": 16, "depth": 2, "heads": 2}


def image(seed: int, size: tuple[int, int] = (SIZE, SIZE), kind: str = "PNG") -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format=kind)
    return file.getvalue()


def write_artifact(folder: Path, kind: str, *, model: dict[str, Any] = VIT, classes: Sequence[str] = CLASSES) -> Path:
    """An MAE-pretrained encoder, or a classifier, with random weights of seed 0."""
    torch.manual_seed(0)
    method = {"name": "mae", "decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2, "norm_pix": False}
    spec = JobSpec.model_validate(
        {"name": "toy", "method": method, "model": model, "data": {"train": {"shards": "none.tar"}}, "epochs": 1}
    )
    network = build_encoder(spec.model)
    mae = None
    if kind == "classifier":
        network = classifier_of(network, len(classes), drop_path=0.0)
        for parameter in network.parameters():  # the head starts too small to tell classes apart
            parameter.data += 0.1 * torch.randn_like(parameter)
    else:
        info = DataInfo(num_instances=8, num_classes=0, shape=(3, SIZE, SIZE))
        config = MAEConfig.model_validate(spec.method.config)
        mae = MAE(config, Inputs(encoder=network, data=info, load=None, build=None))  # type: ignore[arg-type]
    card = {
        "kind": kind,
        "job_id": "toy",
        "spec": spec,
        "paper": "none",
        "classes": list(classes),
        "image_size": SIZE,
        "mean": (0.4, 0.5, 0.6),
        "std": (0.2, 0.25, 0.3),
        "num_instances": 8,
        "datasets": {},
    }
    artifact.write(folder, network, card, mae)
    return folder
