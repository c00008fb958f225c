"""Linear probe of a frozen encoder, as MAE does it (He et al. 2022, arXiv 2111.06377, appendix A.1, table 10).

Images are cropped and flipped, the encoder stays as it is, and one linear layer learns
the classes from what it says of them: of a ViT the CLS token, behind a BatchNorm without
affine parameters. Trained by LARS with large batches.

What is exported is one classifier that timm reads: a trained BatchNorm without affine
parameters is itself linear, so it is multiplied into the layer behind it.

Differences from the released code: a crop that does not fit is drawn again up to ten
times, where theirs is cut to the image at the first; the statistics of BatchNorm are of
the micro-batches of all ranks, where theirs are of 512 samples of one.
"""

from __future__ import annotations

import copy
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.encoders import classifier_of
from workloads.models.vit import ViT
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.frozen import Frozen


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop, bicubic, and flip (table 10)."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class LinearProbeConfig(MethodConfig):
    pool: Literal["cls", "mean"] = "cls"  # of our ViTs; other networks have their own
    view: Augmentation = Augmentation()


class LinearProbe(Method):
    Config = LinearProbeConfig
    paper: ClassVar[str] = "Linear probing protocol of MAE, He et al. 2022, arXiv 2111.06377, appendix A.1"
    exports: ClassVar[str] = "classifier"
    config: LinearProbeConfig

    def __init__(self, config: LinearProbeConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder, num_classes = inputs.encoder, inputs.data.num_classes
        inputs.data.expect_labels()
        if isinstance(encoder, ViT):
            encoder.pool = "token" if config.pool == "cls" else "avg"
        self.encoder = Frozen(encoder)
        width = int(encoder.num_features)  # type: ignore[arg-type]
        self.norm = nn.BatchNorm1d(width, eps=1e-6, affine=False)
        self.head = nn.Linear(width, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, config: LinearProbeConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def logits(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, classes]; no gradient reaches the encoder."""
        with torch.no_grad():
            features = self.encoder(images).float()  # [B, D]
        logits: Tensor = self.head(self.norm(features))
        return logits.float()

    def forward(self, batch: Batch, progress: Progress) -> Output:
        label, logits = batch["label"], self.logits(batch["image"])
        right = logits.detach().argmax(dim=1) == label
        return Output(F.cross_entropy(logits, label), {"accuracy": right.float().mean()})

    @torch.no_grad()
    def export(self) -> nn.Module:
        """W (x - mean) / sqrt(var + eps) + b, written as one linear layer of x."""
        mean, var = self.norm.running_mean, self.norm.running_var
        assert mean is not None and var is not None
        classifier: Any = classifier_of(copy.deepcopy(self.encoder.module), self.head.out_features, fc_norm=False)
        head = classifier.get_classifier()
        head.weight.copy_(self.head.weight * (var + self.norm.eps).rsqrt())
        head.bias.copy_(self.head.bias - head.weight @ mean)
        network: nn.Module = classifier
        return network
