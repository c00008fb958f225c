"""Supervised fine-tuning of a pretrained ViT, as MAE does it (He et al. 2022, appendix A.1; BEiT's recipe).

The encoder gets a fresh head (mean of the patch tokens without CLS, LayerNorm, linear)
and all of it is trained, earlier layers with smaller rates. With `init: null` the same
file trains from scratch, and any network of timm too.

The paper's augmentation (table 9) is there in full but off by default, since small data
and short runs suffer from it: RandAugment and random erasing are fields of `view`, mixup
and CutMix are `mixup` and `cutmix`. A job for ImageNet names them all.

Difference from the released code: mixup and CutMix are drawn for each sample, by its key,
rather than once for a batch. Who is mixed with whom depends on the micro-batch.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.transforms import mixing
from workloads.data.transforms.erasing import Erasing
from workloads.data.transforms.mixing import Mixing
from workloads.data.transforms.randaugment import RandAugment
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.encoders import classifier_of, layer_ids
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.parameter_groups import groups, layer_decay


class Augmentation(RandomResizedCrop):
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"  # code: bicubic, which costs small images more
    randaugment: RandAugment | None = None  # table 9: {magnitude: 9, magnitude_std: 0.5, increasing: true}
    erasing: Erasing | None = None  # code: {p: 0.25}


class FineTuneConfig(MethodConfig):
    layer_decay: float = Field(default=0.65, gt=0, le=1)  # table 9, ViT-B; 0.75 for L and H
    drop_path: float = Field(default=0.1, ge=0, lt=1)  # 0.2 for L, 0.3 for H
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    mixup: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # alpha; table 9: 0.8
    cutmix: float = Field(default=0.0, ge=0, allow_inf_nan=False)  # alpha; table 9: 1.0
    view: Augmentation = Augmentation()


class FineTune(Method):
    Config = FineTuneConfig
    paper: ClassVar[str] = "Fine-tuning protocol of MAE, He et al. 2022, arXiv 2111.06377, appendix A.1"
    exports: ClassVar[str] = "classifier"
    config: FineTuneConfig

    def __init__(self, config: FineTuneConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.num_classes = inputs.data.num_classes
        inputs.data.expect_labels()
        self.classifier = classifier_of(inputs.encoder, self.num_classes, config.drop_path)
        self.classifier.requires_grad_(True)

    @classmethod
    def views(cls, config: FineTuneConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mix(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Images [B, 3, H, W], and what is to be said of them: labels [B] or, where they are mixed, shares [B, C]."""
        config, images, label = self.config, batch["image"], batch["label"]
        if config.mixup == config.cutmix == 0:
            return images, label
        # The loss smooths the labels, mixed or not.
        drawn = Mixing(mixup_alpha=config.mixup, cutmix_alpha=config.cutmix, smoothing=0, mode="elem")
        return mixing.apply(drawn, images, label, self.num_classes, batch["key"], salt="fine_tune")

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, target = self.mix(batch)
        logits: Tensor = self.classifier(images).float()  # [B, classes]
        loss = F.cross_entropy(logits, target, label_smoothing=self.config.label_smoothing)
        right = logits.detach().argmax(dim=1) == batch["label"]  # of a mixture: the sample that came first
        return Output(loss, {"accuracy": right.float().mean()})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Rate g^(depth + 1 - id) by layer; 1-D parameters, `pos_embed` and `cls_token` do not decay."""
        return groups(
            self.classifier.named_parameters(),
            no_decay=("pos_embed", "cls_token"),
            lr_scale=layer_decay(*layer_ids(self.classifier), self.config.layer_decay),
        )

    def export(self) -> nn.Module:
        return self.classifier
