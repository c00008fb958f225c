"""MaskDistill: a unified view of masked image modeling (Peng et al., TMLR 2023, arXiv 2210.10615).

Masked image modelling is L(N(T(x)), H(S(x_masked))) over hidden patches: a teacher T, a normalisation N of what it
says, a student S, a head H and a loss L. The choice of the paper: T is the last block of CLIP's image encoder, N a
LayerNorm without affine, S a BEiT that sees learned tokens in the place of hidden patches, H one linear layer, L
smooth L1. The student is what stays.

The authors released no code; what the paper leaves open is settled here. N is `layer_norm` (biased variance, eps
1e-5), smooth L1 turns linear at 1, the teacher's tokens are taken before its final norm. Teacher and student look at
one crop, which is resized where their patches differ in size. The loss is the mean over the hidden patches of a
micro-batch, whose number varies: masks of blocks may fall short. Masks are drawn from (seed, epoch, row), so that
runs on one and on two ranks agree. Left out: the sparse student of the ablation.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.parts.block_masking import block_masking
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.frozen import Teacher
from workloads.parts.parameter_groups import TOKENS, groups
from workloads.parts.patches import unpatchify
from workloads.parts.reconstruction import hide, masked_mean
from workloads.parts.tokens import grid_of, hidden_patches, patch_size_of, patch_tokens

POOLING = ("attn_pool", "fc_norm")
"""Behind the tokens of timm's transformers: the loss does not reach these."""


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop, flip and colour jitter, as in BEiT."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    photometry: Photometry = Photometry(brightness=0.4, contrast=0.4, saturation=0.4)


class MaskDistillConfig(MethodConfig):
    teacher: str  # CLIP in the paper: timm:vit_base_patch16_clip_quickgelu_224.openai; any transformer will do
    mask_ratio: float = Field(default=0.4, gt=0, lt=1)  # of the patches, block-wise
    min_block: int = Field(default=16, ge=1)  # patches of the smallest block, of 196: BEiT
    beta: float = Field(default=1.0, gt=0)  # where smooth L1 turns linear
    view: Augmentation = Augmentation()


class MaskDistill(Method):
    Config = MaskDistillConfig
    paper: ClassVar[str] = "MaskDistill: A Unified View of Masked Image Modeling, Peng et al. 2023, arXiv 2210.10615"
    config: MaskDistillConfig

    def __init__(self, config: MaskDistillConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = inputs.encoder
        self.grid = kept_grid(self.encoder)
        self.hidden = int(self.grid**2 * config.mask_ratio)
        if config.min_block > self.hidden:
            raise ValueError(
                f"got min_block={config.min_block} where mask_ratio={config.mask_ratio} hides {self.hidden} of "
                f"{self.grid**2} patches, expected a block that fits; use at most {self.hidden}, or smaller patches"
            )
        for name in POOLING:
            if (pooling := getattr(self.encoder, name, None)) is not None:
                pooling.requires_grad_(False)
        self.teacher = Teacher(inputs.load(config.teacher), View(size=inputs.data.side))
        self.teacher_size = size_for(self.teacher.module, self.grid)
        dim = int(self.encoder.num_features)  # type: ignore[arg-type]
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.head = nn.Linear(dim, self.teacher.width)
        for weight in (self.mask_token, self.head.weight):
            nn.init.trunc_normal_(weight, std=0.02)
        nn.init.zeros_(self.head.bias)

    @classmethod
    def views(cls, config: MaskDistillConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Tensor:
        """int64 [B] -> [B, L], 1 where a patch is hidden; about `mask_ratio` of them, never more."""
        window = (1, self.grid, self.grid)
        blocks = block_masking(keys, window, self.hidden, min_area=self.config.min_block, salt="maskdistill.mask")
        return blocks.flatten(1).float()

    @torch.no_grad()
    def target(self, images: Tensor) -> Tensor:
        """N(T(x)) of the whole images [B, 3, H, W]: [B, L, C]."""
        seen = self.teacher.see(images, self.teacher_size)
        return normalise(patch_tokens(self.teacher.module, seen, norm=False))

    def predict(self, images: Tensor, mask: Tensor) -> Tensor:
        """H(S(x_masked)): o [B, L, C]; what is under hidden patches has no influence."""
        with hidden_patches(self.encoder, mask, self.mask_token):
            return self.head(patch_tokens(self.encoder, images))

    def loss(self, o: Tensor, f: Tensor, mask: Tensor) -> Tensor:
        """Smooth L1 between o and f [B, L, C], over hidden patches only."""
        return masked_mean(F.smooth_l1_loss(o.float(), f, reduction="none", beta=self.config.beta), mask)

    def forward(self, batch: Batch, progress: Progress) -> Output:
        images, mask = batch["image"], self.mask(batch["key"])
        return Output(self.loss(self.predict(images, mask), self.target(images), mask))

    def parameter_groups(self) -> list[dict[str, Any]]:
        """As BEiT: vectors, positions (relative ones too) and tokens do not decay."""
        return groups(self.named_parameters(), no_decay=(*TOKENS, "relative_position_bias_table"))

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """`original`, `masked` (hidden patches grey), and features as colours: `target`, `prediction` where hidden.

        Colours are the first three principal components of the image's own target.
        """
        images, p = batch["image"], patch_size_of(self.encoder)
        mask, f = self.mask(batch["key"]), self.target(batch["image"])
        o = torch.where(mask[:, :, None] > 0, self.predict(images, mask).float(), f)
        mean = f.mean(dim=1, keepdim=True)
        axes = torch.linalg.svd(f - mean, full_matrices=False).Vh[:, :3].mT  # [B, C, 3]
        scale = ((f - mean) @ axes).std(dim=1, keepdim=True)

        def coloured(tokens: Tensor) -> Tensor:
            return unpatchify(((tokens - mean) @ axes / scale).repeat(1, 1, p * p), p)

        masked = hide(images, mask, p)
        return {"original": images, "masked": masked, "target": coloured(f), "prediction": coloured(o)}

    def export(self) -> nn.Module:
        return self.encoder


def normalise(tokens: Tensor) -> Tensor:
    """N: each token [..., C] by its own mean and (biased) variance, in float32."""
    return F.layer_norm(tokens.float(), tokens.shape[-1:])


def kept_grid(network: nn.Module) -> int:
    """Patches in a row, of a network whose last tokens are still its patches.

    Raises:
        ValueError: it has no patches, or merges them on the way.
    """
    grid, patch = grid_of(network), patch_size_of(network)
    stages: Any = getattr(network, "feature_info", None)  # of timm; ours merges nothing
    if stages and stages[-1]["reduction"] != patch:
        raise ValueError(
            f"got {type(network).__name__}, which merges its patches of {patch} pixels to {stages[-1]['reduction']}, "
            "expected one token for each patch up to the end; use a ViT or a BEiT"
        )
    return grid


def size_for(teacher: nn.Module, grid: int) -> int:
    """Side of the image, in pixels, of which the teacher makes grid x grid tokens.

    Raises:
        ValueError: its grid is another one, and fixed.
    """
    theirs = kept_grid(teacher)
    if theirs != grid and not getattr(teacher, "dynamic_img_size", False):
        raise ValueError(
            f"got a teacher with {theirs} x {theirs} patches for a student with {grid} x {grid}, expected the same "
            f"grid of {type(teacher).__name__}, whose size is fixed; set image_size or patch_size of model:, or use a "
            "ViT of timm, which takes images of any size"
        )
    return patch_size_of(teacher) * grid
