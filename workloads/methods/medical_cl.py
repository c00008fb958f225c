"""Contrastive learning of global and local features for medical image segmentation with few annotations.

Chaitanya et al., NeurIPS 2020, arXiv 2006.10511. Scans of one anatomy lie alike: slices at the same relative height
show the same organs. Stage 1 trains the encoder e: slices of one part of all volumes are alike, those of other parts
are not. Stage 2 trains the first blocks of the decoder, d_l, on top of it: regions of a map are alike in two views of
a slice, other regions are not. Stage 3, the fine-tuning with few labels, is the evaluation `volume_segmentation`.

The two stages are two jobs. The first has a `unet` and one of the global losses; the second has the same network with
`decoder_blocks`, `init:` of the first and one of the local losses. Its encoder is frozen, but for the statistics of
BatchNorm, which goes by the batch as in the released code and follows it.

Paper and released code. Like the code, G^D matches each volume of the batch with the next one and the last with the
first; volumes of a batch are drawn without repetition, epoch by epoch. The code's batches end in rows of zeros that
are compared too, and its random operations have a fixed seed: neither is copied. Losses are divided by the number of
rows as in the code, not of terms; Adam does not see it. A crop of 192 pixels is given as shares of the side; it is
sampled where it lies instead of being cut out first. Not at hand, and chosen: of a region, the negatives are the
five nearest ones, where the code lists five neighbours of each; g2 is as wide as the map; L^D takes the pairs of G^D.
Regions are always projected. Partitions are those of the slices that a volume has, so `depth` must hold the deepest
one; what it cuts off is lost. Bias correction (N4) is up to whoever packs the data. Volumes of a batch are compared
with each other: leave `micro_batch_size` unset.
"""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.modalities import Views
from workloads.data.transforms.volume import VolumeGeometry, VolumeView
from workloads.data.views import Size, height_width
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.unet import UNet
from workloads.parts.gather import gather_with_gradient
from workloads.parts.infonce import nt_xent
from workloads.parts.slices import jitter, one_of_each_part, take_slices, window
from workloads.parts.volume_contrast import SIDE, global_terms, local_terms, regions, ring

VIEWS = {"gr": "tt", "gd_minus": "xtt", "gd": "xt", "lr": "tt", "ld": "tt"}  # x: a slice, t: a random view of it


class MedicalCLConfig(MethodConfig):
    loss: Literal["gr", "gd_minus", "gd", "lr", "ld"] = "gd"  # G^R, G^D-, G^D of stage 1; L^R, L^D of stage 2
    depth: int = Field(ge=2)  # slices of the box that each volume is put into: of the deepest one
    spacing_mm: tuple[float, float] | None = None  # of the pixels of a slice: 1.367, .625, 1.5 in the paper
    partitions: int = Field(default=4, ge=2)  # S, code
    temperature: float = Field(default=0.1, gt=0)  # tau, code
    dim: int = Field(default=128, ge=1)  # of what is compared
    hidden_dim: int = Field(default=1024, ge=1)  # of g1
    crop: float = Field(default=100 / 192, gt=0, le=1)  # code; share of the side
    corner: tuple[float, float] = (10 / 192, 69 / 192)  # code; where it begins, likewise
    brightness: float = Field(default=0.3, ge=0)  # code; added
    contrast: float = Field(default=0.3, ge=0, le=1)  # code

    @model_validator(mode="after")
    def _inside(self) -> MedicalCLConfig:
        if not 0 <= self.corner[0] <= self.corner[1] <= 1 - self.crop + 1e-6:  # 1 - 0.8 is less than 0.2
            raise ValueError(f"got corner={self.corner} for crop={self.crop}, expected 0 <= low <= high <= 1 - crop")
        return self


class GlobalStage(nn.Module):
    """e and g1."""

    def __init__(self, config: MedicalCLConfig, encoder: UNet, image_size: int) -> None:
        super().__init__()
        if len(encoder.decoder):
            raise ValueError(
                f"got a U-Net with decoder_blocks={len(encoder.decoder)} for loss {config.loss}, expected none: it "
                "trains the encoder; leave them out, or take loss: lr"
            )
        self.config, self.encoder = config, encoder
        width = encoder.num_features * (image_size // encoder.stride) ** 2
        hidden = nn.Linear(width, config.hidden_dim, bias=False)
        self.g1 = nn.Sequential(nn.Flatten(), hidden, nn.ReLU(), nn.Linear(config.hidden_dim, config.dim, bias=False))

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, V, S, C, H, W] -> loss, and its terms."""
        z = self.g1(self.encoder.forward_features(images.flatten(0, 2))).unflatten(0, images.shape[:3])  # [B, V, S, D]
        if self.config.loss == "gr":
            logits, right = nt_xent(z[:, 0].flatten(0, 1), z[:, 1].flatten(0, 1), self.config.temperature)
            terms = F.cross_entropy(logits, right, reduction="none")
            return terms.mean(), terms
        z = gather_with_gradient(z)
        terms = global_terms(z, self.config.loss, self.config.temperature)
        return terms.sum() / z.shape[:3].numel(), terms


class LocalStage(nn.Module):
    """e, which is frozen, d_l and g2."""

    def __init__(self, config: MedicalCLConfig, encoder: UNet, image_size: int) -> None:
        super().__init__()
        l, width = len(encoder.decoder), encoder.num_features  # noqa: E741 - the paper's symbol
        if l == 0:
            raise ValueError(
                f"got a U-Net without a decoder for loss {config.loss}, which trains its first blocks; set "
                "decoder_blocks of the model, 3 in the paper, and init: to the job of stage 1"
            )
        self.config, self.encoder = config, encoder
        encoder.levels.requires_grad_(False)
        side = image_size // encoder.stride * 2**l
        self._corners, self._negatives = regions(side, side)
        first, last = (nn.Conv2d(width, width, 1, bias=False) for _ in range(2))
        self.g2 = nn.Sequential(first, nn.BatchNorm2d(width), nn.ReLU(), last)
        self.project = nn.Linear(SIDE**2 * width, config.dim, bias=False)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """[B, 2, S, C, H, W] -> loss, and its terms."""
        maps = self.g2(self.encoder.forward_features(images.flatten(0, 2)))
        windows = maps.unfold(2, SIDE, 1).unfold(3, SIDE, 1)  # [N, C, h - 2, w - 2, 3, 3]
        y, x = (list(axis) for axis in zip(*self._corners, strict=True))
        f = self.project(windows[:, :, y, x].transpose(1, 2).flatten(2))  # [N, 13, D]
        f = f.unflatten(0, images.shape[:3])
        pairs = [(f[:, 0], f[:, 1])] if self.config.loss == "lr" else ring(gather_with_gradient(f))
        both = [pair for f, g in pairs for pair in ((f, g), (g, f))]
        terms = torch.stack([local_terms(f, g, self._negatives, self.config.temperature) for f, g in both])
        return terms.mean(), terms


class MedicalCL(Method):
    Config = MedicalCLConfig
    paper: ClassVar[str] = (
        "Contrastive Learning of Global and Local Features for Medical Image Segmentation with Limited Annotations, "
        "Chaitanya et al. 2020, arXiv 2006.10511"
    )
    config: MedicalCLConfig

    def __init__(self, config: MedicalCLConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        if not isinstance(inputs.encoder, UNet):
            raise ValueError(f"got model {type(inputs.encoder).__name__}, expected a U-Net; use model: {{name: unet}}")
        stage: Any = GlobalStage if config.loss.startswith("g") else LocalStage
        self.stage = stage(config, inputs.encoder, inputs.data.side)

    @classmethod
    def views(cls, config: MedicalCLConfig, image_size: Size) -> Views:
        spacing_mm = (None, *config.spacing_mm) if config.spacing_mm else None
        size = config.depth, *height_width(image_size)
        return {"volume": VolumeView(size=size, spacing_mm=spacing_mm, clip_percentiles=(1, 99), normalise="minmax")}

    def slices(self, batch: Batch) -> Tensor:
        """[B, S, C, H, W]: one of each partition; of G^R any S of the volume."""
        volume, S = batch["volume"], self.config.partitions
        covered = VolumeGeometry.unpacked(batch["volume_geometry"]).covered(volume.shape[2:])
        first, count = (axes[:, 0] for axes in covered)
        u = uniform(batch["key"], S, "slice")
        if self.config.loss == "gr":
            return take_slices(volume, first[:, None] + (u * count[:, None]).long())
        return take_slices(volume, one_of_each_part(first, count, u))

    def view(self, slices: Tensor, key: Tensor, salt: str) -> Tensor:
        """t(x): a crop in stage 1 only, since regions of both views must stay at their places; other intensities."""
        config, (B, S), H = self.config, slices.shape[:2], slices.shape[-1]
        u = uniform(key, 4 * S, salt).view(B * S, 4)
        images = slices.flatten(0, 1)
        if isinstance(self.stage, GlobalStage):
            low, high = (round(share * H) for share in config.corner)
            centre = (low + (u[:, :2] * (high - low + 1)).floor()) / H + config.crop / 2
            images = window(images, centre, torch.full_like(u[:, 0], config.crop), torch.zeros_like(u[:, 0]))
        shift, factor = config.brightness * (2 * u[:, 2] - 1), 1 + config.contrast * (2 * u[:, 3] - 1)
        return jitter(images, shift, factor).unflatten(0, (B, S))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        x = self.slices(batch)
        kinds = VIEWS[self.config.loss]
        views = [x if kind == "x" else self.view(x, batch["key"], f"view{i}") for i, kind in enumerate(kinds)]
        loss, terms = self.stage(torch.stack(views, dim=1))
        return Output(loss, {"positive_share": (-terms.detach()).exp().mean()})  # of 1 + negatives

    def export(self) -> nn.Module:
        return self.stage.encoder
