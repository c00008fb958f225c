"""Segmentation of volumes with few labels: a whole U-Net is fine-tuned on the slices of some labelled volumes.

Stage 3 of Chaitanya et al. 2020 (arXiv 2006.10511): what the decoder lacks and the last layer are fresh, all of it
learns by Adam and the Dice loss, and the answers to the slices of each test volume are put together: Dice in 3-D,
the mean over the classes but 0 and over volumes. Each seed draws other labelled volumes and other fresh weights.

Where it differs: slices are turned, scaled and shifted and their intensities change, but there is no elastic
deformation; the last weights are asked, not those that were best on labelled volumes kept for that; the Dice loss
sums over the batch, since a slice without a class says nothing of it. Volumes are seen as the job saw them. All
slices are kept in memory.
"""

from __future__ import annotations

import copy
import math
import statistics
from contextlib import closing
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads import assemble
from workloads.data.manifest import DataError, Manifest
from workloads.data.modalities import Views
from workloads.data.order import permutation
from workloads.data.reader import Reader
from workloads.data.transforms.volume import LabelsView, VolumeGeometry, VolumeView
from workloads.evaluation.base import EvaluationConfig, Subject, label_of, summary
from workloads.evaluation.features import device_of
from workloads.models.unet import Segmenter, UNet
from workloads.parts.slices import jitter, window
from workloads.spec import JobSpec

TURN_RAD, ZOOM, SHIFT, BRIGHTNESS, CONTRAST = math.radians(15), 0.1, 0.1, 0.3, 0.3  # most of each, both ways
SEEN = {"member", "size", "spacing_mm", "clip_percentiles", "window", "normalise"}  # of a view, what is not random
CHUNK = 32  # slices in one forward


class VolumeSegmentationConfig(EvaluationConfig):
    """Volumes hold a class for each voxel, 0 being the background, in files beside them.

    Attributes:
        labelled_volumes: drawn by the seed; None: all.
        member: suffix of the labels in the shards.
        steps: of Adam.
        batch_size: slices.
        lr: constant.
    """

    labelled_volumes: int | None = Field(default=2, ge=1)
    member: str = "seg.nii.gz"
    steps: int = Field(default=10_000, ge=1)
    batch_size: int = Field(default=10, ge=1)
    lr: float = Field(default=1e-3, gt=0)


def seen_volume(spec: JobSpec) -> VolumeView:
    """The view of volumes of a job's method, without what is random."""
    view = next((view for view in assemble.views_of(spec).values() if isinstance(view, VolumeView)), None)
    if view is None:
        raise ValueError(
            f"got method {spec.method.name}, which looks at no volumes, expected one that does, such as medical_cl; "
            "masks of images are for the evaluation `segmentation`"
        )
    return VolumeView(**view.model_dump(include=SEEN))


def read(manifest: Manifest, view: VolumeView, member: str) -> list[tuple[Tensor, Tensor]]:
    """The slices [n, C, H, W] of each volume and their classes, uint8 [n, H, W]."""
    views: Views = {"volume": view, "labels": LabelsView(member=member, fill=0)}
    reader = Reader(manifest, views, batch_size=1, shuffle=False, drop_last=False)
    volumes = []
    with closing(reader.batches(0, reader.steps_per_epoch)) as stream:
        for batch in stream:
            covered = VolumeGeometry.unpacked(batch["volume_geometry"]).covered(view.size)
            first, count = (int(axes[0, 0]) for axes in covered)
            x, y = batch["volume"][0].transpose(0, 1), batch["labels"][0].to(torch.uint8)
            volumes.append((x[first : first + count], y[first : first + count]))
    return volumes


def augmented(x: Tensor, y: Tensor, u: Tensor) -> tuple[Tensor, Tensor]:
    """Slices [B, C, H, W] and int64 classes [B, H, W], moved alike by draws of [-1, 1), [B, 6]."""
    centre, scale, turn = 0.5 + SHIFT * u[:, :2], 1 + ZOOM * u[:, 2], TURN_RAD * u[:, 3]
    images = jitter(window(x, centre, scale, turn), BRIGHTNESS * u[:, 4], 1 + CONTRAST * u[:, 5])
    return images, window(y[:, None].float(), centre, scale, turn, nearest=True)[:, 0].long()


def dice_loss(logits: Tensor, y: Tensor) -> Tensor:
    """1 - the mean over all classes of 2 |P T| / (|P| + |T|), of the probabilities P [B, K, H, W] and classes T."""
    p = logits.softmax(dim=1)
    t = F.one_hot(y, logits.shape[1]).movedim(-1, 1)
    axes = (0, 2, 3)
    return 1 - (2 * (p * t).sum(axes) / (p.sum(axes) + t.sum(axes) + 1e-10)).mean()


def dice(answer: Tensor, truth: Tensor, classes: int) -> float:
    """Mean of 2 |A T| / (|A| + |T|) over the classes but 0 that either holds; 1 where there are none."""
    table = torch.bincount(truth.flatten().long() * classes + answer.flatten(), minlength=classes**2)
    table = table.view(classes, classes).double()  # [truth, answer]
    both, either = table.diagonal()[1:], (table.sum(dim=0) + table.sum(dim=1))[1:]
    return float((2 * both[either > 0] / either[either > 0]).mean()) if either.any() else 1.0


def fine_tuned_dice(
    model: nn.Module, train: Manifest, test: Manifest, view: VolumeView, config: VolumeSegmentationConfig, seed: int
) -> float:
    """Dice on the test volumes of a copy of `model` that learned where the model is."""
    if not isinstance(model, UNet):
        raise ValueError(f"got model {type(model).__name__}, expected a U-Net; use model: {{name: unet}}")
    device = device_of(model)
    known, asked = (read(manifest, view, config.member) for manifest in (train, test))
    x, y = (torch.cat(column).to(device) for column in zip(*known, strict=True))
    classes = 1 + max(int(labels.max()) for _, labels in known + asked)
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = Segmenter(copy.deepcopy(model), classes).to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), config.lr)
    for _ in range(config.steps):
        rows = torch.randint(len(x), (config.batch_size,), generator=generator)
        u = 2 * torch.rand(config.batch_size, 6, generator=generator, dtype=torch.float64) - 1
        images, labels = augmented(x[rows.to(device)], y[rows.to(device)], u.to(device))
        optimizer.zero_grad()
        dice_loss(network(images), labels).backward()
        optimizer.step()
    network.eval()
    with torch.inference_mode():
        answers = [
            torch.cat([network(part.to(device)).argmax(dim=1).cpu() for part in x.split(CHUNK)]) for x, _ in asked
        ]
    return statistics.fmean(dice(answer, truth, classes) for answer, (_, truth) in zip(answers, asked, strict=True))


class VolumeSegmentation:
    Config: ClassVar[type[EvaluationConfig]] = VolumeSegmentationConfig

    def run(self, config: VolumeSegmentationConfig, subject: Subject) -> dict[str, Any] | None:
        view, n = seen_volume(subject.spec), config.labelled_volumes
        train, test = (assemble.open_stream(stream) for stream in (config.data.train, config.data.test))
        if n is not None and n > len(train):
            raise DataError(f"got labelled_volumes={n}, expected at most the {len(train)} that there are; lower it")
        results = {}
        for who, model in subject.encoders(untrained=config.untrained).items():
            values = []
            for seed in config.seeds:
                if subject.should_stop():
                    return None
                known = train if n is None else train.take(np.sort(permutation(seed, 0, 0, len(train))[:n]))
                values.append(subject.place.scan(fine_tuned_dice, model, known, test, view, config, seed))
            results[who] = summary(values)
        return {"label": label_of("volume_segmentation", n), "metric": "Dice", "results": results}
