"""BINAS: training of its supernet (Nayman et al. 2022, arXiv 2110.12399, with the schedule of HardCoRe-NAS).

First the largest network of the space is trained alone. Its copy, as it is then, teaches the rest of the training, in
which each image takes a random path through the supernet: the loss is cross-entropy plus gamma times what the copy
says, the KL divergence of the classes and the mean squared distance of the maps behind each stage over `divisor`.
`search: {name: binas}` measures its networks afterwards. The export is the supernet, by itself its largest network.

A path is drawn for each image, by its key, not for each batch: gradients are of many networks at once, and so are the
statistics of BatchNorm, which is what evaluation uses (see `models.binas_supernet`).

Differences from the released code: it trains twice, for 300 epochs at batch 256 and rate 0.128 that falls by 0.97 every
2.4 epochs, then for 100 at batch 200 and rate 0.0128 that falls as a cosine; here it is one run under one schedule, of
which `largest` is the share of the first part.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.binas_supernet import BinasSupernet
from workloads.models.encoders import classifier_of
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.ema import copy_of, follow
from workloads.parts.parameter_groups import groups


class BinasConfig(MethodConfig):
    largest: float = Field(default=0.75, gt=0, lt=1)  # of the steps; code: 300 of 400 epochs
    gamma: float = Field(default=1.0, ge=0)  # weight of distillation
    divisor: float = Field(default=50.0, gt=0)  # of the distances of maps
    label_smoothing: float = Field(default=0.1, ge=0, lt=1)  # of the first part, as what follows
    dropout: float = Field(default=0.3, ge=0, lt=1)  # of what the classifier sees
    drop_path: float = Field(default=0.2, ge=0, lt=1)  # of the last block; earlier ones drop less
    view: RandomResizedCrop = RandomResizedCrop()


class Binas(Method):
    Config = BinasConfig
    paper: ClassVar[str] = "BINAS, Nayman et al. 2022, arXiv 2110.12399"
    exports: ClassVar[str] = "classifier"
    config: BinasConfig

    def __init__(self, config: BinasConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        if not isinstance(inputs.encoder, BinasSupernet):
            raise ValueError(
                f"got {type(inputs.encoder).__name__}, expected the supernet that binas trains; "
                "set model: {name: binas_supernet}"
            )
        inputs.data.expect_labels()
        classifier = classifier_of(inputs.encoder, inputs.data.num_classes)
        assert isinstance(classifier, BinasSupernet)
        self.supernet = classifier.requires_grad_(True)
        self.teacher = copy_of(self.supernet).eval()

    @classmethod
    def views(cls, config: BinasConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def train(self, mode: bool = True) -> Binas:
        super().train(mode)
        self.teacher.eval()
        return self

    def first_part(self, progress: Progress) -> int:
        """Its steps."""
        return max(1, round(self.config.largest * progress.total_steps))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, label = batch["image"], batch["label"]
        if progress.step < self.first_part(progress):
            logits = self.largest(images, batch["key"])
            loss = F.cross_entropy(logits, label, label_smoothing=self.config.label_smoothing)
            return Output(loss, {"accuracy": accuracy(logits, label)})
        maps = self.supernet.maps(images, self.supernet.space.random_paths(batch["key"]))
        logits = self.supernet.forward_head(maps[-1]).float()
        with torch.no_grad():
            taught = self.teacher.maps(images)
            target = self.teacher.forward_head(taught[-1]).float().softmax(dim=1)
        distances = [F.mse_loss(ours.float(), theirs.float()) for ours, theirs in zip(maps, taught, strict=True)]
        terms = {
            "ce": F.cross_entropy(logits, label),
            "kd": F.kl_div(logits.log_softmax(dim=1), target, reduction="batchmean"),
            "maps": torch.stack(distances).sum() / self.config.divisor,
        }
        loss = terms["ce"] + self.config.gamma * (terms["kd"] + terms["maps"])
        return Output(
            loss, {name: term.detach() for name, term in terms.items()} | {"accuracy": accuracy(logits, label)}
        )

    def largest(self, images: Tensor, key: Tensor) -> Tensor:
        """Logits [B, classes] of the largest network; what is dropped goes by the keys [B] of the images."""
        net, config = self.supernet, self.config
        blocks = len(net.space.widths) * net.space.max_depth
        maps = net.maps(images, keep=kept(key, torch.linspace(0, config.drop_path, blocks), "drop_path"))
        hidden = net.forward_head(maps[-1], pre_logits=True)
        dropped = hidden * kept(key, torch.tensor(config.dropout).expand(hidden.shape[1]), "dropout").to(hidden.dtype)
        return net.classifier(dropped).float()

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Gain and bias of BatchNorm do not decay, also where there is a row of them for each configuration."""
        return groups(self.supernet.named_parameters(), no_decay=("gain2", "bias2", "gain3", "bias3"))

    def after_step(self, progress: Progress) -> None:
        if progress.step + 1 == self.first_part(progress):
            follow(self.teacher, self.supernet, 0.0)
            for theirs, ours in zip(self.teacher.buffers(), self.supernet.buffers(), strict=True):
                theirs.copy_(ours)

    def export(self) -> nn.Module:
        return self.supernet


def kept(key: Tensor, rates: Tensor, salt: str) -> Tensor:
    """For rates [n] of what is dropped, factors [B, n]: 0, or what keeps the mean."""
    rates = rates.to(key.device)
    return (uniform(key, len(rates), salt) >= rates) / (1 - rates)


def accuracy(logits: Tensor, label: Tensor) -> Tensor:
    return (logits.detach().argmax(dim=1) == label).float().mean()
