"""Features of a whole dataset, from a frozen encoder or from raw pixels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from workloads import artifact, assemble
from workloads.data.manifest import DataError, Manifest
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.evaluation.base import EvaluationConfig, Subject

BATCH_SIZE = 256


@dataclass(frozen=True)
class Features:
    x: Tensor  # [N, D] float32
    y: Tensor  # [N] int64


def batches(manifest: Manifest, view: View) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [B, 3, H, W] and labels [B], in order, each once."""
    size = min(BATCH_SIZE, len(manifest))
    reader = Reader(manifest, {"image": view}, batch_size=size, shuffle=False, drop_last=False)
    with closing(reader.batches(0, reader.steps_per_epoch)) as stream:
        for batch in stream:
            yield normalise(batch["image"], view), batch["label"]


def device_of(model: nn.Module) -> torch.device:
    return next((p.device for p in model.parameters()), torch.device("cpu"))


@torch.inference_mode()
def extract(model: nn.Module, manifest: Manifest, view: View) -> Features:
    """Where the model is; the features are on the CPU."""
    device = device_of(model)
    pairs = [(model(images.to(device)).float().cpu(), label) for images, label in batches(manifest, view)]
    return Features(torch.cat([x for x, _ in pairs]).clone(), torch.cat([y for _, y in pairs]).clone())


def few(features: Features, rows: np.ndarray) -> Features:
    """The part of a training set at `rows`."""
    index = torch.from_numpy(rows)
    return Features(features.x[index], features.y[index])


def labelled(config: EvaluationConfig) -> tuple[Manifest, Manifest]:
    """Train and test manifests; refuses data without labels."""
    manifests = assemble.open_stream(config.data.train), assemble.open_stream(config.data.test)
    for manifest in manifests:
        if manifest.num_classes < 2 or (manifest.label < 0).any():
            raise DataError(
                f"got {(manifest.label < 0).sum()} of {len(manifest)} samples without label in "
                f"{manifest.shards[0]}, expected a .cls member in each; evaluate on labelled shards"
            )
    return manifests


def plain_view(subject: Subject) -> View:
    """The deterministic view that the artifact is served with."""
    card = artifact.read_card(subject.artifact)
    return View(size=card.image_size, mean=card.mean, std=card.std)


def feature_sets(
    train: Manifest, test: Manifest, subject: Subject, *, untrained: bool, raw_pixels: bool
) -> dict[str, tuple[Features, Features]]:
    """Train and test features by who made them: the pretrained and untrained encoder and, if asked, raw pixels."""
    view = plain_view(subject)
    models = subject.encoders(untrained=untrained)
    if raw_pixels:
        models["raw_pixels"] = nn.Flatten()
    scan = partial(subject.place.scan, extract)
    return {who: (scan(model, train, view), scan(model, test, view)) for who, model in models.items()}
