"""Crops of several sizes through one network (multi-crop: SwAV, Caron et al. 2020, arXiv 2006.09882)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import Size, View, height_width
from workloads.models.vit import ViT
from workloads.parts.crop import RandomResizedCrop

JITTER = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.2, "hue": 0.1, "jitter_p": 0.8, "gray_p": 0.2}
"""Of BYOL (Grill et al. 2020, arXiv 2006.07733), without its blur."""
GLOBAL = (0.4, 1.0)  # code of DINO; 0.14 where there are no local crops
LOCAL = (0.05, 0.4)  # code of DINO


class MultiCropView(RandomResizedCrop):
    """That of BYOL (section 3.2), with the crops of SwAV, as DINO joins them (Caron et al. 2021, arXiv 2104.14294)."""

    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    photometry: Photometry = Photometry()


GLOBAL_VIEW = MultiCropView(crop_scale=GLOBAL, photometry=Photometry(**JITTER, blur_p=1.0))
OTHER_VIEW = MultiCropView(crop_scale=GLOBAL, photometry=Photometry(**JITTER, blur_p=0.1, solarize_p=0.2))
LOCAL_VIEW = MultiCropView(crop_scale=LOCAL, photometry=Photometry(**JITTER, blur_p=0.5))


def crop_views(
    image_size: Size, large: tuple[MultiCropView, MultiCropView], local_size: Size, small: MultiCropView, n: int
) -> dict[str, View]:
    """Two large crops, `image` and `other`, and n small ones, `local0`, `local1`, ..."""
    local = View(size=local_size, **small.model_dump())
    views = {name: View(size=image_size, **x.model_dump()) for name, x in zip(("image", "other"), large, strict=True)}
    return views | {f"local{i}": local for i in range(n)}


def crops_of(batch: Mapping[str, Any], n: int) -> list[Tensor]:
    """What the views of `crop_views` show, in their order."""
    return [batch["image"], batch["other"], *(batch[f"local{i}"] for i in range(n))]


def expect_local_crops(encoder: Any, local_size: Size) -> None:
    """Refuses a network that cannot look at local crops.

    Raises:
        ValueError: its patches do not fill them, or it takes images of one size only.
    """
    size = height_width(local_size)
    if isinstance(encoder, ViT) and any(side % encoder.config.patch_size for side in size):
        p = encoder.config.patch_size
        fits = [max(1, side // p) * p for side in size]
        raise ValueError(
            f"got local_size={local_size} for patches of {p}, expected a multiple; "
            f"use {fits[0] if isinstance(local_size, int) else fits}"
        )
    if getattr(getattr(encoder, "patch_embed", None), "strict_img_size", False):
        raise ValueError(
            f"got model {type(encoder).__name__}, which takes images of one size only, for local crops of "
            f"{local_size}, expected any size; add options: {{dynamic_img_size: true}} to the model (of a Swin "
            "strict_img_size: false), or set local_crops: 0"
        )


def multi_crop(encoder: nn.Module, crops: Sequence[Tensor]) -> list[Tensor]:
    """Crops [B_i, 3, H_i, W_i] -> features [B_i, ...] of each; those of one size are one batch of the encoder."""
    places: dict[torch.Size, list[int]] = {}
    for place, crop in enumerate(crops):
        places.setdefault(crop.shape[1:], []).append(place)
    features: dict[int, Tensor] = {}
    for same in places.values():
        together: Tensor = encoder(torch.cat([crops[place] for place in same]))
        features |= zip(same, together.split([len(crops[place]) for place in same]), strict=True)
    return [features[place] for place in range(len(crops))]
