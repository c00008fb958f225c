"""The field's standard augmentations for pairs and sets of views, as data: geometry and colour of each view.

Where a paper leaves a number out, it is taken from the authors' released code, and the comment says "code".
"""

from __future__ import annotations

from workloads.data.transforms.photometry import Photometry
from workloads.data.views import View

PILLOW_BLUR = 13  # pixels: what Pillow's GaussianBlur covers at sigma 2, on an image of any size


def moco_v1(image_size: int = 224) -> dict[str, View]:
    """MoCo v1 (He et al. 2020, section 3.3, "Technical details": the operations; code: the numbers).

    Colour is jittered before the conversion to grey, as the paper says; the code converts first.
    """
    view = View(size=image_size, crop_scale=(0.2, 1.0), flip=0.5)  # code; section 3.3 names crop and flip
    photometry = Photometry(
        brightness=0.4,  # code, as the three below
        contrast=0.4,
        saturation=0.4,
        hue=0.4,
        gray_p=0.2,  # code
    )
    return dict.fromkeys(("query", "key"), view.model_copy(update={"photometry": photometry}))


def moco_v2(image_size: int = 224) -> dict[str, View]:
    """MoCo v2 (Chen, Fan et al. 2020, table 1, "aug+": blur is added; code: the numbers)."""
    view = View(size=image_size, crop_scale=(0.2, 1.0), flip=0.5)  # code
    photometry = Photometry(
        brightness=0.4,  # code, as the four below
        contrast=0.4,
        saturation=0.4,
        hue=0.1,
        jitter_p=0.8,
        gray_p=0.2,  # code
        blur_p=0.5,  # code
        blur_sigma=(0.1, 2.0),  # code
        blur_kernel=PILLOW_BLUR,
    )
    return dict.fromkeys(("query", "key"), view.model_copy(update={"photometry": photometry}))


def simclr(image_size: int = 224, strength: float = 1.0, blur_p: float = 0.5) -> dict[str, View]:
    """SimCLR (Chen, Kornblith et al. 2020, appendix A).

    Args:
        image_size: side of both views in pixels.
        strength: s of the colour distortion; 1 for ImageNet, 0.5 for CIFAR-10 (appendix B.9).
        blur_p: 0.5 for ImageNet, 0 for CIFAR-10 (appendix B.9).
    """
    view = View(
        size=image_size,
        crop_scale=(0.08, 1.0),  # appendix A, "Random crop and resize to 224x224"
        crop_ratio=(3 / 4, 4 / 3),  # appendix A
        flip=0.5,  # appendix A
        interpolation="bicubic",  # code
    )
    photometry = Photometry(
        brightness=0.8 * strength,  # appendix A, "Color distortion", as the five below
        contrast=0.8 * strength,
        saturation=0.8 * strength,
        hue=0.2 * strength,
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=blur_p,  # appendix A, "Gaussian blur": "50% of the time", as the two below
        blur_sigma=(0.1, 2.0),
        blur_kernel=None,  # 10 % of the side
    )
    return dict.fromkeys(("view_1", "view_2"), view.model_copy(update={"photometry": photometry}))


def _byol_photometry(blur_p: float, solarize_p: float, blur_kernel: int | None = None) -> Photometry:
    """BYOL's colours, which DINO takes over (Caron et al. 2021, section 3.2)."""
    return Photometry(
        brightness=0.4,  # BYOL, table 6, as the five below
        contrast=0.4,
        saturation=0.2,
        hue=0.1,
        jitter_p=0.8,
        gray_p=0.2,
        blur_p=blur_p,
        blur_sigma=(0.1, 2.0),  # BYOL, appendix B
        blur_kernel=blur_kernel,  # BYOL, appendix B: 23 pixels at 224, so 10 % of the side
        solarize_p=solarize_p,
        solarize_threshold=0.5,  # BYOL, appendix B
    )


def byol(image_size: int = 224) -> dict[str, View]:
    """BYOL (Grill et al. 2020, appendix B and table 6); the two views differ in blur and solarisation.

    Brightness is multiplied, as in every later PyTorch version; the authors' code adds an offset.
    """
    view = View(
        size=image_size,
        crop_scale=(0.08, 1.0),  # appendix B
        crop_ratio=(3 / 4, 4 / 3),  # appendix B
        flip=0.5,  # table 6
        interpolation="bicubic",  # appendix B
    )
    return {
        "view_1": view.model_copy(update={"photometry": _byol_photometry(1.0, 0.0)}),  # table 6, T
        "view_2": view.model_copy(update={"photometry": _byol_photometry(0.1, 0.2)}),  # table 6, T'
    }


def dino(
    image_size: int = 224,
    local_size: int = 96,
    local_crops: int = 8,
    global_scale: tuple[float, float] = (0.4, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.4),
) -> dict[str, View]:
    """DINO's multi-crop (Caron et al. 2021, section 3): two global views, and local ones that only the student sees.

    Args:
        image_size: side of the global views in pixels; 224 in section 3.1.
        local_size: side of the local views in pixels; 96 in section 3.1.
        local_crops: number of local views; 8 in code.
        global_scale: shares of the area that global views cover: (s, 1) in appendix E; s = 0.4 in code, 0.25 in the
            commands of its released ViTs.
        local_scale: the same of local views: (0.05, s).
    """
    large = View(size=image_size, crop_scale=global_scale, flip=0.5, interpolation="bicubic")  # section 3.2; flip: code
    small = large.model_copy(update={"size": local_size, "crop_scale": local_scale})
    local = small.model_copy(update={"photometry": _byol_photometry(0.5, 0.0, PILLOW_BLUR)})  # blur_p: code
    return {
        "global_1": large.model_copy(
            update={"photometry": _byol_photometry(1.0, 0.0, PILLOW_BLUR)}
        ),  # BYOL, table 6, T
        "global_2": large.model_copy(
            update={"photometry": _byol_photometry(0.1, 0.2, PILLOW_BLUR)}
        ),  # BYOL, table 6, T'
        **{f"local_{i}": local for i in range(1, local_crops + 1)},
    }
