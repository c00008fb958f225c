"""Supervised fine-tuning of a pretrained ViT, as MAE does it (He et al. 2022, appendix A.1; BEiT's recipe).

The encoder gets a fresh head (mean of the patch tokens without CLS, LayerNorm, linear)
and all of it is trained, earlier layers with smaller rates. With `init: null` the same
file trains from scratch.

Left out here: RandAugment, mixup, cutmix and random erasing of the paper's ImageNet recipe.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.views import View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.encoders import classifier_of, layer_ids
from workloads.parts.parameter_groups import groups, layer_decay


class Augmentation(MethodConfig):
    crop_scale: tuple[float, float] = (0.08, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rotate_deg: float = 0.0


class FineTuneConfig(MethodConfig):
    layer_decay: float = Field(default=0.65, gt=0, le=1)  # table 9, ViT-B; 0.75 for L and H
    drop_path: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)
    view: Augmentation = Augmentation()


class FineTune(Method):
    Config = FineTuneConfig
    paper: ClassVar[str] = "Fine-tuning protocol of MAE, He et al. 2022, arXiv 2111.06377, appendix A.1"
    exports: ClassVar[str] = "classifier"
    config: FineTuneConfig

    def __init__(self, config: FineTuneConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        if inputs.data.num_classes < 2:
            raise ValueError(
                f"got data with {inputs.data.num_classes} classes, expected labels of 2 or more; "
                "add a .cls member to each sample (`manta pack` does)"
            )
        self.classifier = classifier_of(inputs.encoder, inputs.data.num_classes, config.drop_path)
        self.classifier.requires_grad_(True)

    @classmethod
    def views(cls, config: FineTuneConfig, image_size: int) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        label: Tensor = batch["label"]
        logits = self.classifier(batch["image"]).float()  # [B, classes]
        loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
        return Output(loss, {"accuracy": (logits.detach().argmax(dim=1) == label).float().mean()})

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Rate g^(depth + 1 - id) by layer; 1-D parameters, `pos_embed` and `cls_token` do not decay."""
        return groups(
            self.classifier.named_parameters(),
            no_decay=("pos_embed", "cls_token"),
            lr_scale=layer_decay(*layer_ids(self.classifier), self.config.layer_decay),
        )

    def export(self) -> nn.Module:
        return self.classifier
