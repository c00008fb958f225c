"""One-Million-Way: train a one million-way instance classifier (Liu, Huang, Pan and others, AAAI 2021).

arXiv 2102.04848. Each image is a class of its own: the feature of a view should be most like the row of its image,
unlike the rows of all other images. All N of them are in the denominator, spread over the ranks
(`parts.sharded_softmax`): nothing is sampled, and there is no second network and no queue. Rows start as the features
of an untrained network, so that the task is contrast from the first step on, and the rows most like that of the image
are wanted a little, too. Biases and norms do not decay; rows do.

Written by the paper and a student's reproduction of it; code of the authors was not found. Not certain: K, the head,
how often the neighbours of a row are found anew (here in every step, from the rows as they are, without a table of
N x K), and how long rows are at first. Here they have unit length: it means nothing to the cosine and divides what a
step turns a row by.

With `init: raw` the first epoch trains nothing: in it BatchNorm finds its statistics, forward without gradients, and
after it each rank fills the rows that it has with the features of these images as they are, not augmented, BatchNorm
by its statistics. So a job has one epoch more than the paper says, and the cosine of its rate is one epoch in when
training starts. A `pipe:` is refused: its numbers are no images.

Memory of a rank: n = N / ranks rows of 128 floats, 1,024 n bytes with the momentum of SGD (AdamW: 1,536 n); 5,000 n
at the peak of a step (measured on a CPU, `make bench`: rows of unit length and the gradients of what they are used
for), and 3 GiB for logits at most.
    N = 1e6: 8 ranks 0.6 GB, 64 ranks 0.08 GB;  N = 1e8: 8 ranks 63 GB, 64 ranks 7.8 GB  (SGD, at the peak)
Export and a run on one rank build all rows: 512 bytes an image, 51 GB of them for 1e8.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress, Scan
from workloads.parts.crop import MoCoCrop
from workloads.parts.heads import mlp
from workloads.parts.sharded_softmax import RowsOverRanks, instance_cross_entropy


class MillionWayConfig(MethodConfig):
    dim: int = Field(default=128, ge=1)
    temperature: float = Field(default=0.15, gt=0)  # tau
    alpha: float = Field(default=0.2, ge=0, lt=1)  # share of the target that the neighbours have
    hardest: int = Field(default=100, ge=0)  # K neighbours; uncertain
    init: Literal["raw", "random"] = "raw"  # of the rows; random: unit vectors, trained from the first step on
    view: MoCoCrop = MoCoCrop()


class MillionWay(Method):
    Config = MillionWayConfig
    paper: ClassVar[str] = "Train a One-Million-Way Instance Classifier, Liu et al. 2021, arXiv 2102.04848"
    config: MillionWayConfig

    def __init__(self, config: MillionWayConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        inputs.data.expect_index()
        encoder: Any = inputs.encoder
        width = encoder.num_features
        self.encoder = encoder
        self.projector = mlp(width, width, config.dim)
        self.instances = RowsOverRanks(inputs.data.num_instances, config.dim)  # W
        self.plain = {"image": View(size=inputs.data.shape[1:])}

    @classmethod
    def views(cls, config: MillionWayConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> x [B, dim] in float32."""
        x: Tensor = self.projector(self.encoder(images))
        return x.float()

    def forward(self, batch: Batch, progress: Progress) -> Output:
        if self.config.init == "raw" and progress.epoch == 0:
            with torch.no_grad():
                self.features(batch["image"])  # moves the statistics of BatchNorm
            return Output(None)
        c, x = self.config, self.features(batch["image"])
        loss, right = instance_cross_entropy(
            x, batch["index"], self.instances, c.temperature, alpha=c.alpha, hardest=c.hardest
        )
        return Output(loss.mean(), {"instance_top1": right.float().mean()})

    def after_epoch(self, progress: Progress, scan: Scan) -> None:
        if self.config.init == "random" or progress.epoch > 0:
            return
        self.eval()
        own = range(self.instances.first, self.instances.first + self.instances.share)
        for batch in scan(self.streams[0], self.plain, own):
            self.instances.write(batch["index"], F.normalize(self.features(batch["image"]), dim=1))
        self.train()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The rows are a group of their own: an optimizer steps what is shared out and what is whole apart."""
        rows = self.instances.weight
        default = super().parameter_groups()
        return [g | {"params": [p for p in g["params"] if p is not rows]} for g in default] + [{"params": [rows]}]

    def export(self) -> nn.Module:
        return self.encoder
