"""Linear segmentation: which class each place of a frozen feature map belongs to, scored by the mean IoU.

A 1 x 1 convolution learns on maps that are computed once, each channel normalised; its answer is resized to the pixels
of the mask (bilinear), in training too. The mean is over classes that the test masks or the answers hold, of the
intersection over the union of all test pixels together (PASCAL VOC, Everingham et al. 2015).

Maps and masks of the whole set are kept in memory: 4 * C * h * w + H * W bytes an image.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads import assemble
from workloads.data.manifest import Manifest
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.transforms.targets import MaskView
from workloads.data.views import Size, View
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import device_of, plain_view
from workloads.parts.feature_maps import dense_features
from workloads.parts.schedules import warmup_cosine

BATCH_SIZE = 16


class SegmentationConfig(EvaluationConfig):
    """Masks hold a class for each pixel, in files of one channel beside the images.

    Attributes:
        size: of the views; None: what the artifact is served with. Of a ViT a multiple of its patch.
        member: suffix of the masks in the shards.
        ignore: class of pixels that do not count.
        epochs: passes of the linear layer.
        batch_size: images.
        lr: of SGD with momentum 0.9, half a cosine.
    """

    size: Size | None = None
    member: str = "seg.png"
    ignore: int = Field(default=255, ge=0)
    epochs: int = Field(default=60, ge=1)
    batch_size: int = Field(default=16, ge=1)
    lr: float = Field(default=0.5, gt=0)


@dataclass(frozen=True)
class Dense:
    x: Tensor  # [N, C, h, w] float32
    y: Tensor  # [N, H, W] uint8, the class of each pixel


@torch.inference_mode()
def extract_dense(model: nn.Module, manifest: Manifest, view: View, mask: MaskView) -> Dense:
    """Maps of all images in their order, where the model is; they and the masks are on the CPU."""
    device, maps, masks = device_of(model), [], []
    size = min(BATCH_SIZE, len(manifest))
    reader = Reader(manifest, {"image": view, "mask": mask}, batch_size=size, shuffle=False, drop_last=False)
    with closing(reader.batches(0, reader.steps_per_epoch)) as stream:
        for batch in stream:
            maps.append(dense_features(model, normalise(batch["image"], view).to(device))[0].float().cpu())
            masks.append(batch["mask"].to(torch.uint8))
    return Dense(torch.cat(maps).clone(), torch.cat(masks).clone())


def mean_iou(answer: Tensor, truth: Tensor, *, classes: int, ignore: int) -> float:
    """Mean over classes of intersection / union of all pixels that count; classes that neither holds are left out."""
    counts = truth != ignore
    pairs = truth[counts].long() * classes + answer[counts].long()
    table = torch.bincount(pairs, minlength=classes**2).view(classes, classes).double()  # [truth, answer]
    both = table.diagonal()
    either = table.sum(dim=0) + table.sum(dim=1) - both
    return float((both[either > 0] / either[either > 0]).mean())


def segment(train: Dense, test: Dense, config: SegmentationConfig, seed: int) -> float:
    """Trains the layer on `train` and returns the mean IoU on `test`; the seed sets weights and order."""
    generator = torch.Generator().manual_seed(seed)
    known = torch.cat([y[y != config.ignore].unique() for y in (train.y, test.y)])
    if not len(known):
        raise ValueError(
            f"got masks of class {config.ignore} only, which is ignored, expected other classes; set `ignore` to that "
            "of the pixels that do not count"
        )
    classes = int(known.max()) + 1
    mean = train.x.mean(dim=(0, 2, 3), keepdim=True)
    scale = train.x.var(dim=(0, 2, 3), unbiased=False, keepdim=True).add(1e-6).rsqrt()
    x, x_test = (train.x - mean) * scale, (test.x - mean) * scale
    head = nn.Conv2d(x.shape[1], classes, kernel_size=1)
    nn.init.trunc_normal_(head.weight, std=0.01, generator=generator)
    assert head.bias is not None
    nn.init.zeros_(head.bias)

    def answer(maps: Tensor) -> Tensor:
        return F.interpolate(head(maps), size=train.y.shape[1:], mode="bilinear", align_corners=False)

    optimizer = torch.optim.SGD(head.parameters(), lr=config.lr, momentum=0.9)
    size = min(config.batch_size, len(x))
    steps = config.epochs * (len(x) // size)
    rows = [torch.randperm(len(x), generator=generator)[: len(x) // size * size] for _ in range(config.epochs)]
    for step, part in enumerate(torch.cat(rows).split(size)):
        optimizer.param_groups[0]["lr"] = warmup_cosine(step, warmup=steps / 10, total=steps, base=config.lr)
        optimizer.zero_grad()
        F.cross_entropy(answer(x[part]), train.y[part].long(), ignore_index=config.ignore).backward()
        optimizer.step()
    with torch.inference_mode():
        said = torch.cat([answer(part).argmax(dim=1) for part in x_test.split(size)])
    return mean_iou(said, test.y, classes=classes, ignore=config.ignore)


class Segmentation:
    Config: ClassVar[type[EvaluationConfig]] = SegmentationConfig

    def run(self, config: SegmentationConfig, subject: Subject) -> dict[str, Any]:
        view = plain_view(subject)
        view = view.model_copy(update={"size": config.size or view.size})
        mask = MaskView(member=config.member, fill=config.ignore)
        manifests = [assemble.open_stream(stream) for stream in (config.data.train, config.data.test)]
        results = {}
        for who, model in subject.encoders(untrained=config.untrained).items():
            train, test = (subject.place.scan(extract_dense, model, each, view, mask) for each in manifests)
            results[who] = summary([segment(train, test, config, seed) for seed in config.seeds])
        return {"label": "segmentation", "metric": "mIoU", "results": results}
