"""DeepLabV3 (Chen et al. 2017, arXiv 1706.05587) without its last layer: a backbone, and the head that looks around.

The head (atrous spatial pyramid pooling) sees the maps of the backbone by convolutions of several dilation rates and as
the mean of the image, side by side; another convolution joins them. It is an encoder: its maps are those of the head,
its features their mean. On the maps a 1 x 1 convolution says the class of each place (evaluation `segmentation`).

As in mmsegmentation, 512 channels and a joining convolution of 3 x 3 rather than the paper's 256 and 1 x 1, BatchNorm
and ReLU behind each convolution, and the rate 1 is a convolution of 1 x 1.

Importing this module makes the architecture known to timm: after `import workloads.models.deeplab` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from workloads.models.encoders import TimmConfig, build_encoder, model_config
from workloads.models.maps import last_maps, unread
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.timm_import import timm
from workloads.spec import Named


class DeepLabConfig(BaseModel):
    """`{name: deeplab, backbone: resnet50}`; `{..., backbone: resnet_cifar, options: {depth: 8}, output_stride: 4}`.

    Attributes:
        image_size: of the images.
        backbone: a name of ours or of timm, as in `model:`.
        options: what else `model:` would say of it.
        output_stride: pixels between two places of its maps; one of timm that can have several is built with this.
        channels: of each branch of the head, and of what it gives.
        rates: of dilation, a branch each.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: int = Field(default=224, ge=1)
    backbone: str = "resnet50"
    options: dict[str, Any] = {}
    output_stride: int = Field(default=16, ge=1)
    channels: int = Field(default=512, ge=1)
    rates: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1, 6, 12, 18), min_length=1)  # of stride 16

    @model_validator(mode="after")
    def _of_the_backbone(self) -> Self:
        if refused := self.options.keys() & {"name", "image_size"}:
            raise ValueError(f"got options {', '.join(sorted(refused))}, expected other ones; write them beside these")
        model_config(self.model)
        return self

    @property
    def model(self) -> Named:
        """The backbone as `model:` of a job says it."""
        return Named.model_validate({"name": self.backbone, "image_size": self.image_size} | self.options)

    def build(self) -> DeepLab:
        return DeepLab(self)

    def settled(self) -> tuple[Named, int, list[str]]:
        """The backbone as it is built, the channels of its maps, and names of its parameters that these do not need.

        Raises:
            ValueError: its maps are of another stride.
        """
        model = self.model
        shape, idle = _maps(model, self.image_size)
        places = math.ceil(self.image_size / self.output_stride)
        if shape[-1] != places and isinstance(config := model_config(model), TimmConfig):
            options = config.options | {"output_stride": self.output_stride}
            model = Named.model_validate({"name": model.name} | model.config | {"options": options})
            try:
                shape, idle = _maps(model, self.image_size)
            except ValueError:  # it knows no such argument: what is wrong is the stride
                model = self.model
        if shape[-1] != places:
            stride = round(self.image_size / shape[-1])
            raise ValueError(
                f"got output_stride={self.output_stride} for backbone {self.backbone}, whose maps of {self.image_size} "
                f"pixels have {shape[-1]} places a side, expected {places}; set output_stride: {stride}"
            )
        return model, shape[1], idle


def _maps(model: Named, size: int) -> tuple[torch.Size, list[str]]:
    """Shape of the last maps, [1, C, h, w], and names of the parameters that they do not need; nothing is computed."""
    with torch.device("meta"), torch.enable_grad():
        network = build_encoder(model).eval()
        maps = last_maps(network, torch.empty(1, 3, size, size))
        return maps.shape, unread(network, maps)


class ConvNormReLU(nn.Sequential):
    def __init__(self, channels_in: int, channels: int, kernel: int, rate: int = 1) -> None:
        padding = kernel // 2 * rate
        convolution = nn.Conv2d(channels_in, channels, kernel, padding=padding, dilation=rate, bias=False)
        nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        super().__init__(convolution, nn.BatchNorm2d(channels), nn.ReLU())


class DeepLab(PooledCNN):
    """Backbone and head; a classifier, if there is one, is of whole images."""

    def __init__(self, config: DeepLabConfig, num_classes: int = 0) -> None:
        super().__init__(config.channels, architecture="deeplab", args=config.model_dump(mode="json"))
        model, C, idle = config.settled()
        self.backbone = build_encoder(model)
        for name in idle:
            self.backbone.get_parameter(name).requires_grad_(False)
        width, branches = config.channels, 1 + len(config.rates)
        self.pool = ConvNormReLU(C, width, 1)
        self.branches = nn.ModuleList(ConvNormReLU(C, width, 1 if rate == 1 else 3, rate) for rate in config.rates)
        self.bottleneck = ConvNormReLU(branches * width, width, 3)
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of the names of parameters by depth: stem and blocks as backbones usually call them, the rest."""
        return {
            "stem": r"^backbone\.(?:stem|conv_stem|conv1|bn1|patch_embed|cls_token|pos_embed)",
            "blocks": [
                (r"^backbone\.layer(\d+)" if coarse else r"^backbone\.layer(\d+)\.(\d+)", None),
                (r"^backbone\.(?:blocks|stages)\.(\d+)", None),
            ],
        }

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the maps of the head, [B, num_features, H / output_stride, W / output_stride]."""
        x = last_maps(self.backbone, images)
        pooled = self.pool(x.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, *x.shape[2:])
        return self.bottleneck(torch.cat([pooled, *(branch(x) for branch in self.branches)], dim=1))


def _network(num_classes: int = 0, **config: Any) -> DeepLab:
    return DeepLab(DeepLabConfig.model_validate(config), num_classes)


def deeplab(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        _network, "deeplab", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(deeplab)
