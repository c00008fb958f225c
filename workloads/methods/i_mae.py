"""i-MAE: are latent representations in masked autoencoders linearly separable? (Zhang and Shen 2022, arXiv 2210.11470).

MAE is fed with a mixture of two images and asked for the single ones: one linear layer for
each image that is asked for separates its latent from that of the mixture, the shared
decoder makes pixels of it, and a MAE that is already pretrained says what the latent of
the clean image would have been (distillation). By default the image of the smaller weight,
the subordinate one, is asked for: the hard target.

Where paper and released code differ: the paper draws both branches, the code has one;
`target` chooses, and its default is what was released. Trainer, sampling and metrics were
never released: weights of the mixture other than the demo's 0.3, `s`, and MAE's optimizer
are as the paper says them in words. Each image is the subordinate one of one pair, so that
a weight drawn from Beta is folded to min(a, 1 - a): without an order of the weights the two
branches would not know which image is theirs.

Partners come from the same micro-batch, the only images at hand: another size of the
micro-batch is another pairing (another number of ranks with the same micro-batches is not).
Weight, mask and partner are drawn by the keys of the samples; the partner is the next image
on a ring on which the keys lie, so nobody is paired with itself.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from workloads.data.keys import uniform
from workloads.data.transforms.mixing import beta
from workloads.data.views import Size, View
from workloads.methods.base import Batch, Inputs, Method, MethodConfig, Output, Progress
from workloads.models.vit import ViT, init_transformer, plain_vit
from workloads.parts.crop import RandomResizedCrop
from workloads.parts.frozen import Frozen, Teacher
from workloads.parts.mae_decoder import DecoderConfig, MAEDecoder
from workloads.parts.masking import Mask, expect_visible, random_masking, take
from workloads.parts.reconstruction import filled_in, hide, masked_mse, pixel_target

BRANCHES = ("subordinate", "dominant")  # image 1 of weight a < 0.5, image 2 of weight 1 - a


class Augmentation(RandomResizedCrop):
    """RandomResizedCrop, bicubic, and flip: those of MAE; no colour jitter."""

    crop_scale: tuple[float, float] = (0.2, 1.0)
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"


class Drawn(MethodConfig):
    """A weight for each pair from Beta(beta, beta), folded to its smaller half."""

    beta: float = Field(default=1.0, gt=0)


class IMAEConfig(DecoderConfig, MethodConfig):
    teacher: str | None  # a MAE with its decoder, of the same patches; null: no distillation
    a: Annotated[float, Field(gt=0, lt=0.5)] | Drawn = 0.3  # weight of the subordinate image; code: the demo's
    target: Literal["subordinate", "dominant", "both"] = "subordinate"  # code; the paper's figure has both
    distillation: float = Field(default=1.0, gt=0)  # code: weight of L_dis beside L_rec
    s: float | None = Field(default=None, ge=0, le=1)  # probability of a partner of the same class; null: of any
    mask_ratio: float = Field(default=0.5, gt=0, lt=1)  # code: the demo's; its forward() says 0.75
    view: Augmentation = Augmentation()


def mixture(one: Tensor, two: Tensor, a: Tensor) -> Tensor:
    """I_m = a I_1 + (1 - a) I_2, of normalised images [B, 3, H, W] and weights [B]."""
    return torch.lerp(two, one, a.to(one.dtype).view(-1, 1, 1, 1))


def partners(keys: Tensor, label: Tensor | None = None, s: float | None = None) -> Tensor:
    """Which image each one is mixed with: the next wanted one on a ring on which they lie by their keys.

    Without `s` that is one random cycle through all. With it each image wants, with probability s, one of its own
    class, else one of another; where there is none of them it takes any, and only where it is alone itself.

    Args:
        keys: int64 [B].
        label: int64 [B], -1 where there is none.
        s: degree of semantics.

    Returns:
        int64 [B].
    """
    place, coin = uniform(keys, 2, salt="i_mae.partner").unbind(1)
    cost = (place[None, :] - place[:, None]) % 1  # [B, B] in [0, 1): from each image ahead to each other
    if s is not None:
        assert label is not None
        alike = (label[:, None] == label[None, :]) & (label[:, None] >= 0)
        cost = cost + (alike != (coin < s)[:, None])
    return (cost + 2 * torch.eye(len(keys), device=keys.device)).argmin(dim=1)


def _sizes(encoder: ViT, decoder: MAEDecoder) -> dict[str, object]:
    """What teacher and student must have in common to compare tokens."""
    vit = encoder.config
    return {"image_size": vit.image_size, "patch_size": vit.patch_size, "decoder_dim": decoder.embed.out_features}


class IMAE(Method):
    Config = IMAEConfig
    paper: ClassVar[str] = (
        "i-MAE: Are Latent Representations in Masked Autoencoders Linearly Separable?, Zhang and Shen 2022, "
        "arXiv 2210.11470"
    )
    config: IMAEConfig

    def __init__(self, config: IMAEConfig, inputs: Inputs) -> None:
        super().__init__(config, inputs)
        self.encoder = plain_vit(inputs.encoder, "i-MAE drops tokens inside the encoder")
        self.encoder.pos_embed.requires_grad_(False)
        vit = self.encoder.config
        expect_visible(vit.grid**2, config.mask_ratio)
        if config.s is not None and inputs.data.num_classes < 2:
            raise ValueError(
                f"got s={config.s} for data with {inputs.data.num_classes} classes, expected labels of 2 or more; "
                "leave s out, or add a .cls member to each sample"
            )
        self.decoder = MAEDecoder(config, vit.dim, vit.grid, vit.patch_size**2 * 3)
        self.branches = BRANCHES if config.target == "both" else (config.target,)
        self.layers = [self.decoder.embed]  # W_b; a list, since the first one is the decoder's own
        if config.target == "both":
            self.second = nn.Linear(vit.dim, config.decoder_dim)
            init_transformer(self.second)
            self.layers.append(self.second)
        self.teacher: Teacher | None = None
        if config.teacher is not None:
            frozen = inputs.restore(config.teacher)
            self._expect_alike(frozen)
            self.teacher = Teacher(frozen, self.views(config, vit.image_size)["image"])

    def _expect_alike(self, teacher: Frozen) -> None:
        """Raises ValueError where the teacher has no decoder, or other tokens."""
        encoder, decoder = (getattr(teacher.module, name, None) for name in ("encoder", "decoder"))
        if not isinstance(encoder, ViT) or not isinstance(decoder, MAEDecoder):
            raise ValueError(
                f"got a teacher of method {type(teacher.module).__name__}, expected one with encoder and decoder; "
                "name the artifact of a job of MAE"
            )
        theirs, ours = _sizes(encoder, decoder), _sizes(self.encoder, self.decoder)
        if theirs != ours:
            raise ValueError(
                f"got a teacher of {theirs}, expected {ours}; change model or decoder_dim, or name another"
            )

    @classmethod
    def views(cls, config: IMAEConfig, image_size: Size) -> dict[str, View]:
        return {"image": View(size=image_size, **config.view.model_dump())}

    def mask(self, keys: Tensor) -> Mask:
        noise = uniform(keys, self.encoder.config.grid**2, salt="i_mae.mask")  # [B, L]
        return random_masking(noise, self.config.mask_ratio)

    def weight(self, keys: Tensor) -> Tensor:
        """A of each pair, float64 [B] in [0, 0.5]."""
        if isinstance(self.config.a, Drawn):
            drawn = beta(self.config.a.beta, keys, "i_mae.a")
            return torch.minimum(drawn, 1 - drawn)
        return torch.full(keys.shape, self.config.a, dtype=torch.float64, device=keys.device)

    def encode(self, images: Tensor, mask: Mask) -> Tensor:
        """[B, 3, H, W] -> [B, 1 + K, D]: positions are added before tokens are dropped."""
        return self.encoder.encode(take(self.encoder.embed(images), mask.ids_keep))

    def separate(self, latent: Tensor) -> dict[str, Tensor]:
        """z_b = W_b h + c_b of each image that is asked for: the mixture's [B, 1 + K, D] -> [B, 1 + K, Dd] each."""
        return {branch: layer(latent) for branch, layer in zip(self.branches, self.layers, strict=True)}

    @torch.no_grad()
    def clean_latent(self, images: Tensor, mask: Mask) -> Tensor:
        """t_b: what the teacher's latents of clean images are at the width of the decoder, [B, 1 + K, Dd]."""
        assert self.teacher is not None
        mae: Any = self.teacher.module
        t: Tensor = mae.decoder.embed(mae.encode(self.teacher.see(images), mask))
        return t

    def loss(self, one: Tensor, two: Tensor, a: Tensor, mask: Mask) -> tuple[Tensor, Tensor]:
        """L_rec and L_dis, each summed over the images that are asked for.

        Args:
            one: normalised images [B, 3, H, W] of weight a.
            two: their partners.
            a: [B].
            mask: one for each pair; the teacher sees each clean image through the same.
        """
        p = self.encoder.config.patch_size
        images = dict(zip(BRANCHES, (one, two), strict=True))
        reconstruction = distillation = one.new_zeros(())
        for branch, z in self.separate(self.encode(mixture(one, two, a), mask)).items():
            clean = pixel_target(images[branch], p, norm_pix=False)  # code: raw pixels of the clean image
            reconstruction = reconstruction + masked_mse(self.decoder.decode(z, mask), clean, mask.mask)
            if self.teacher is not None:
                t = self.clean_latent(images[branch], mask)
                distillation = distillation + F.mse_loss(z.float(), t.float())
        return reconstruction, distillation

    def forward(self, batch: Batch, progress: Progress) -> Output:
        one, keys, label, s = batch["image"], batch["key"], batch["label"], self.config.s
        partner = partners(keys, label, s)
        reconstruction, distillation = self.loss(one, one[partner], self.weight(keys), self.mask(keys))
        metrics = {"reconstruction": reconstruction.detach(), "distillation": distillation.detach()}
        if s is not None:  # what came out: a small micro-batch of many classes has few pairs of one
            metrics["same_class"] = (label == label[partner]).float().mean()
        return Output(reconstruction + self.config.distillation * distillation, metrics)

    @torch.no_grad()
    def pictures(self, batch: Batch) -> dict[str, Tensor]:
        """What is mixed, the `mixture`, `masked` (hidden patches grey), and a reconstruction of each image asked for.

        `original` is the subordinate image, `partner` the dominant one; a lonely image is mixed with itself. In a
        reconstruction visible patches are those of the mixture, hidden ones are predicted.
        """
        one, keys, p = batch["image"], batch["key"], self.encoder.config.patch_size
        two, mask = one[partners(keys)], self.mask(keys)
        mixed = mixture(one, two, self.weight(keys))
        drawn = {"original": one, "partner": two, "mixture": mixed, "masked": hide(mixed, mask.mask, p)}
        for branch, z in self.separate(self.encode(mixed, mask)).items():
            pred = self.decoder.decode(z, mask)
            drawn[f"{branch}_reconstruction"] = filled_in(mixed, pred, mask.mask, p, norm_pix=False)
        return drawn

    def export(self) -> nn.Module:
        return self.encoder
