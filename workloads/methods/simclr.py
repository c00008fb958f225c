"""SimCLR: a simple framework for contrastive learning of visual representations (Chen et al., ICML 2020).

arXiv 2002.05709; the projection head is that of its second version (arXiv 2006.10029), as in the released code. Two
views of an image should have like features behind a head that is thrown away, unlike both views of all other images
of the batch (NT-Xent).

Paper and released code: the paper takes the mean over all anchors, as here; the code adds the means of the two views,
which is twice as much and matters to optimizers other than LARS. Images are not normalised by mean and deviation, as
in the code. Both views go through the network together, so that BatchNorm sees them as one batch, that of all ranks.
Other images of the batch are what a view is compared with, so micro-batches make the task easier: leave
`micro_batch_size` unset. The released LARS has the learning rate inside its momentum, ours outside (`parts.lars_lamb`).
The last bias of a ViT is not trained, since BatchNorm behind the head's first layer takes it out again. Fine-tuning
from the first layer of the head, as the second version does, is not built.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.gather import shares
from workloads.parts.heads import freeze_absorbed_bias, normed_mlp
from workloads.parts.infonce import nt_xent

JITTER = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8, "gray_p": 0.2}  # s = 1


class Augmentation(RandomResizedCrop):
    """Appendix A. For small images the paper halves the jitter (s = 0.5) and leaves the blur out."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    photometry: Photometry = Photometry(**JITTER, blur_p=0.5)


class SimCLRConfig(MethodConfig):
    dim: int = Field(default=128, ge=1)  # of what is compared, appendix B
    layers: int = Field(default=3, ge=1)  # of the head, code; 2 in the first paper
    temperature: float = Field(default=0.1, gt=0)  # ImageNet, table 5; 0.5 for CIFAR-10, appendix B.9
    probe: bool = False  # code: a linear classifier beside, for the curve; no gradient of it reaches the network
    view: Augmentation = Augmentation()


def projection_head(layers: int, width: int, dim: int) -> nn.Sequential:
    """`normed_mlp` as wide as its input; the last BatchNorm has no offset."""
    head = normed_mlp(*[width] * layers, dim)
    for part in head:
        if isinstance(part, nn.Linear):
            nn.init.normal_(part.weight, std=0.01)
    head[-1].bias.requires_grad_(False)
    return head


class SimCLR(Method):
    Config = SimCLRConfig
    paper: ClassVar[str] = (
        "SimCLR: A Simple Framework for Contrastive Learning of Visual Representations, Chen et al. 2020, "
        "arXiv 2002.05709"
    )
    config: SimCLRConfig

    def __init__(self, config: SimCLRConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        encoder: Any = inputs.encoder
        self.encoder = encoder
        freeze_absorbed_bias(encoder)
        self.projector = projection_head(config.layers, encoder.num_features, config.dim)
        if config.probe and inputs.data.num_classes < 2:
            raise ValueError(
                f"got probe: true for data with {inputs.data.num_classes} classes, expected labels of 2 or more; "
                "leave it out, or add a .cls member to each sample"
            )
        self.probe = nn.Linear(encoder.num_features, inputs.data.num_classes) if config.probe else None

    @classmethod
    def views(cls, config: SimCLRConfig, image_size: Size) -> dict[str, View]:
        view = View(size=image_size, mean=(0, 0, 0), std=(1, 1, 1), **config.view.model_dump())
        return {"image": view, "other": view}

    def forward(self, batch: Batch, progress: Progress) -> Output:
        h = self.encoder(torch.cat([batch["image"], batch["other"]]))  # [2 B, width]
        a, b = self.projector(h).chunk(2)
        logits, right = nt_xent(a, b, self.config.temperature)
        loss = F.cross_entropy(logits, right)
        metrics = {"contrast_top1": (logits.argmax(dim=1) == right).float().mean()}
        if self.probe is not None:
            label = batch["label"].repeat(2)
            known, scores = label >= 0, self.probe(h.detach())
            share = shares(known.float())  # images without a label have no say
            loss = loss + (F.cross_entropy(scores.float(), label.clamp(min=0), reduction="none") * share).sum()
            metrics["probe_accuracy"] = ((scores.argmax(dim=1) == label).float() * share).sum()
        return Output(loss, metrics)

    def export(self) -> nn.Module:
        return self.encoder
