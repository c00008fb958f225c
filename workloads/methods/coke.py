"""CoKe: unsupervised visual representation learning by online constrained k-means (Qian et al., CVPR 2022).

arXiv 2105.11527. Images are clustered while the network learns: in each epoch it is trained to tell which cluster each
image was in the epoch before, by the centres of that epoch, and the features that it computes on the way make the
clusters of this one. A dual variable for each cluster keeps them from becoming empty. With two views or more, an image
should also be as like each centre as its other view is. Several clusterings of different sizes are learned at once.

The views are data: `large` of one view is the paper's single-view form (temperature 0.1, and beta 1 in its script),
of two views, the default, the double-view form, and `small: 6` beside makes it multi-view. The target of a view is
alpha of the label and 1 - alpha of what the other large views say, without any it is the label: this is the released
code's loss in all three forms. The second stage, with labels and centres averaged over epochs, is for a single view,
as in the code.

The first epoch only fills labels and centres: there is no loss, so a job of one epoch trains nothing. In the code the
learning rate is 0 then, but momentum gathers gradients; here the optimizer is left out, and the warm-up of the job
counts from step 0. Statistics of BatchNorm move, as there, without the small views.

Differences from the released code: an image that was not assigned yet (batches that are not whole are left out) has no
label and its share of that loss is 0, where in the code it counts for cluster 1; layers before BatchNorm have no bias,
nor has the last norm of a ViT, nor the projection with beta 1, since BatchNorm takes it out again; labels are given in
float32 after the step. In its second stage a label can take two slots of an image, here it takes one.

Labels belong to rows of the manifest, so `pipe:` is refused. BatchNorm and the duals go by the batch of
all ranks: leave `micro_batch_size` unset.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import Size, View
from workloads.methods.base import DRAWN, Batch, Inputs, Method, MethodConfig, Output, Progress, Scan
from workloads.models.vit import ViT
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.gather import Waiting
from workloads.parts.heads import freeze_absorbed_bias, normed_mlp
from workloads.parts.online_kmeans import OnlineKMeans

STRONG = {"brightness": 0.8, "contrast": 0.8, "saturation": 0.8, "hue": 0.2, "jitter_p": 0.8, "gray_p": 0.2}
WEAK = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8, "gray_p": 0.2}


SHOWN = 6  # clusters on the sheet


class Augmentation(RandomResizedCrop):
    """Of a single view, code; those of two views are BYOL's."""

    photometry: Photometry = Photometry(**STRONG, blur_p=0.5)


class CoKeConfig(MethodConfig):
    """Defaults are those of the double-view script of the released code; where the others differ, it is said."""

    dim: int = Field(default=128, ge=1)
    clusters: tuple[Annotated[int, Field(ge=2)], ...] = Field(default=(3000, 4000, 5000), min_length=1)  # K
    temperature: float = Field(default=0.05, gt=0)  # 0.1 of a single view
    ratio: float = Field(default=0.4, ge=0, le=1)  # of the even size that each cluster has at least
    eta: float = Field(default=20.0, gt=0)  # step of the duals, for thousands of clusters; for fewer, in proportion
    alpha: float = Field(default=0.2, ge=0, le=1)  # weight of the label beside the other views
    beta: float = Field(default=0.5, gt=0, le=1)  # weight of predictions beside projections; 1 of a single view
    large: tuple[Augmentation, ...] = Field(
        default=(
            Augmentation(photometry=Photometry(**WEAK, blur_p=1.0)),
            Augmentation(photometry=Photometry(**WEAK, blur_p=0.1, solarize_p=0.2)),
        ),
        min_length=1,
        max_length=2,
    )
    small: int = Field(default=0, ge=0)  # views; 6 of multi-view
    small_size: int = Field(default=96, ge=1)  # pixels
    small_view: Augmentation = Augmentation(crop_scale=(0.05, 0.6))
    large_weight: float = Field(default=0.5, gt=0, le=1)  # of the loss of large views where there are small ones
    stage2_epoch: int | None = Field(default=None, ge=1)  # where it begins; 801 of 1,001 in the single-view script
    slots: int = Field(default=5, ge=1)  # labels of an image that the second stage averages

    @model_validator(mode="after")
    def _single_in_stage_two(self) -> CoKeConfig:
        if self.stage2_epoch is not None and (len(self.large) > 1 or self.small):
            raise ValueError(
                f"got stage2_epoch={self.stage2_epoch} with {len(self.large)} large and {self.small} small views, "
                "expected a single one, for which the paper has it; leave it out, or give one view in `large`"
            )
        return self


class CoKe(Method):
    Config = CoKeConfig
    paper: ClassVar[str] = (
        "CoKe: Unsupervised Visual Representation Learning by Online Constrained K-Means, Qian et al. 2022, "
        "arXiv 2105.11527"
    )
    config: CoKeConfig

    def __init__(self, config: CoKeConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        inputs.data.expect_index()
        encoder: Any = inputs.encoder
        if config.small and _of_one_size(encoder) and config.small_size != inputs.data.side:
            raise ValueError(
                f"got {config.small} small views of {config.small_size} pixels for {type(encoder).__name__}, whose "
                f"positions are of {inputs.data.side}, expected a network of convolutions such as resnet50; or "
                "leave `small` out"
            )
        self.encoder = encoder
        freeze_absorbed_bias(encoder)
        width = encoder.num_features
        self.projector = normed_mlp(width, width, width, config.dim)
        self.predictor = nn.Sequential(*normed_mlp(config.dim, width), nn.ReLU(), nn.Linear(width, config.dim))
        if config.beta == 1:
            self.projector[-1].bias.requires_grad_(False)
        slots = 1 if config.stage2_epoch is None else config.slots
        self.clusterings = nn.ModuleList(
            OnlineKMeans(K, config.dim, inputs.data.num_instances, ratio=config.ratio, eta=config.eta, slots=slots)
            for K in config.clusters
        )
        self._waiting = Waiting()

    @classmethod
    def views(cls, config: CoKeConfig, image_size: Size) -> dict[str, View]:
        large = zip(("image", "other"), config.large, strict=False)
        small = View(size=config.small_size, **config.small_view.model_dump())
        views = {name: View(size=image_size, **view.model_dump()) for name, view in large}
        return views | {f"small{i}": small for i in range(config.small)}

    def project(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, dim], not normalised."""
        return self.projector(self.encoder(images))

    def forward(self, batch: Batch, progress: Progress) -> Output:
        names = list(self.views(self.config, 1))
        n = len(self.config.large)
        if progress.epoch == 0:
            with torch.no_grad():
                self._keep([unit(self.project(batch[name])) for name in names[:n]], batch["index"])
            return Output(None)
        projections = [self.project(batch[name]) for name in names]
        x = [unit(projection) for projection in projections]
        p = [unit(self.predictor(projection)) for projection in projections]
        self._keep(x[:n], batch["index"])
        clusterings: Any = self.clusterings
        losses = torch.stack([self.losses(x, p, k, batch["index"]) for k in clusterings]).mean(dim=0)  # [V]
        loss = losses[:n].mean()
        if self.config.small:
            loss = loss.lerp(losses[n:].mean(), 1 - self.config.large_weight)
        return Output(loss, self._metrics(p[0].detach(), batch["index"]))

    def losses(self, x: list[Tensor], p: list[Tensor], k: OnlineKMeans, index: Tensor) -> Tensor:
        """Of each view by one clustering, [V]; the large ones come first.

        Args:
            x: projections, [B, dim] of unit length, of each view.
            p: predictions, likewise.
            k: the clustering.
            index: int64 [B], which images they are.
        """
        T, alpha, beta = self.config.temperature, self.config.alpha, self.config.beta
        y = k.targets(index)
        by_x, by_p = ([f @ k.C.T / T for f in features] for features in (x, p))
        s = [logits.detach().float().softmax(dim=1) for logits in by_x[: len(self.config.large)]]
        found = []
        for v, (of_x, of_p) in enumerate(zip(by_x, by_p, strict=True)):
            others = [s_u for u, s_u in enumerate(s) if u != v]
            q = alpha * y + (1 - alpha) * torch.stack(others).mean(dim=0) if others else y
            found.append(beta * F.cross_entropy(of_p, q) + (1 - beta) * F.cross_entropy(of_x, q))
        return torch.stack(found)

    def _keep(self, x: list[Tensor], index: Tensor) -> None:
        if self.training:
            self._waiting.put(torch.stack(x).mean(dim=0), index)  # not normalised again

    @torch.no_grad()
    def _metrics(self, p: Tensor, index: Tensor) -> dict[str, Tensor]:
        """How often the first clustering's label is predicted, and its least cluster by the even size."""
        first: Any = self.clusterings[0]
        y = first.targets(index)
        right = ((p @ first.C.T).argmax(dim=1) == y.argmax(dim=1)) & (y.sum(dim=1) > 0)
        return {"cluster_top1": right.float().mean(), "least_cluster": first.sizes.min() / first.sizes.mean()}

    def _averaged(self, progress: Progress) -> int | None:
        """Epochs of the second stage that are done; None in the first."""
        start = self.config.stage2_epoch
        return None if start is None or progress.epoch < start else progress.epoch - start

    def after_step(self, progress: Progress) -> None:
        if columns := self._waiting.take():
            x, index = columns
            for k in self.clusterings:
                k.update(x, index, self._averaged(progress))  # type: ignore[operator]

    def after_epoch(self, progress: Progress, scan: Scan) -> None:
        for k in self.clusterings:
            k.turn(self._averaged(progress))  # type: ignore[operator]

    @torch.no_grad()
    def sheet(self, batch: Batch) -> dict[str, Tensor]:
        """The images that are nearest to the centres of the first clustering which own the most of them, best first."""
        first: Any = self.clusterings[0]
        similarity = unit(self.project(batch["image"])) @ first.C.T  # [B, K]
        owned = similarity.argmax(dim=1).bincount(minlength=similarity.shape[1])
        largest = owned.topk(min(SHOWN, len(owned))).indices.tolist()
        n = min(DRAWN, len(similarity))
        return {f"cluster_{c}": batch["image"][similarity[:, c].topk(n).indices] for c in largest}

    def export(self) -> nn.Module:
        return self.encoder


def unit(features: Tensor) -> Tensor:
    return F.normalize(features.float(), dim=1)


def _of_one_size(encoder: Any) -> bool:
    return isinstance(encoder, ViT) or bool(getattr(encoder, "default_cfg", {}).get("fixed_input_size"))
