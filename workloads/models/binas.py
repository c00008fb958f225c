"""Networks of BINAS (Nayman et al. 2022, arXiv 2110.12399), those of the paper by name.

In front is a 3 x 3 convolution of stride 2, then the blocks of an architecture string, at the end a classifier with a
hidden layer behind the mean over all places: a MobileNetV3 (Howard et al. 2019, arXiv 1905.02244). Weights have timm's
names, whose HardCoRe-NAS networks are of this family: `init: timm:hardcorenas_a` fits the string of that network.

Importing this module makes the architecture known to timm: after `import workloads.models.binas` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import torch.nn.functional as F
import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.architecture import Architecture, ArchitectureError, Block, mobile8, parse, text
from workloads.models.convolution import conv
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.structure import Channels, String
from workloads.models.timm_import import timm

STEM, FEATURES = 32, 1280  # channels in the paper


@cache
def published() -> dict[str, str]:
    """Name -> architecture of the networks that came with the paper."""
    networks: dict[str, str] = yaml.safe_load(Path(__file__).with_name("binas.yaml").read_text())
    return networks


def _structure(string: str) -> str:
    if "[" not in string:
        raise ArchitectureError(
            f"got structure {string[:60]!r}, expected an architecture string or one of {', '.join(published())}"
        )
    return text(parse(string))


class BinasConfig(BaseModel):
    """`{name: binas, structure: binas-a}`, or an architecture string in place of the name.

    Attributes:
        structure: a name of the paper's networks, or a string.
        image_size: only says what is fed in.
        stem: channels in front of the blocks.
        features: of the hidden layer of the classifier.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: Annotated[String, AfterValidator(_structure)]
    image_size: Size = 224
    stem: Channels = STEM
    features: Channels = FEATURES

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, fields: dict[str, Any]) -> dict[str, Any]:
        known = published().get(str(fields.get("structure")))
        return fields if known is None else fields | {"structure": known}

    def build(self) -> Binas:
        return Binas(self.structure, self.stem, self.features)


def activation(relu: bool) -> nn.Module:
    return nn.ReLU() if relu else nn.Hardswish()


class SqueezeExcite(nn.Module):
    """Weighs channels by what the means of all of them say (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv_reduce = nn.Conv2d(channels, mobile8(channels / 4), 1)
        self.conv_expand = nn.Conv2d(mobile8(channels / 4), channels, 1)

    def forward(self, x: Tensor, kept: Tensor | None = None) -> Tensor:
        """[B, C, H, W]; kept [B, R, 1, 1]: which of the R channels inside count."""
        inner = self.conv_reduce(x.mean(dim=(2, 3), keepdim=True)).relu()
        return x * F.hardsigmoid(self.conv_expand(inner if kept is None else inner * kept))


class Residual(nn.Sequential):
    """Its input is added where the shape stays."""

    residual: bool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = super().forward(x)  # type: ignore[no-untyped-call]
        return x + y if self.residual else y


class Separable(Residual):
    """ds: a convolution by channel, then one of 1 x 1."""

    def __init__(self, block: Block, width_in: int) -> None:
        super().__init__()
        self.conv_dw = conv(width_in, width_in, block.kernel, block.stride, width_in)
        self.bn1 = nn.BatchNorm2d(width_in)
        self.act1 = activation(block.relu)
        self.se = SqueezeExcite(width_in) if block.se else nn.Identity()
        self.conv_pw = conv(width_in, block.width)
        self.bn2 = nn.BatchNorm2d(block.width)
        self.residual = block.stride == 1 and width_in == block.width


class Inverted(Residual):
    """ir: wider by a convolution of 1 x 1, one by channel, and narrow again."""

    def __init__(self, block: Block, width_in: int) -> None:
        super().__init__()
        mid = block.inside(width_in)
        self.conv_pw = conv(width_in, mid)
        self.bn1 = nn.BatchNorm2d(mid)
        self.act1 = activation(block.relu)
        self.conv_dw = conv(mid, mid, block.kernel, block.stride, mid)
        self.bn2 = nn.BatchNorm2d(mid)
        self.act2 = activation(block.relu)
        self.se = SqueezeExcite(mid) if block.se else nn.Identity()
        self.conv_pwl = conv(mid, block.width)
        self.bn3 = nn.BatchNorm2d(block.width)
        self.residual = block.stride == 1 and width_in == block.width


class Convolution(nn.Sequential):
    """cn: a convolution."""

    def __init__(self, block: Block, width_in: int) -> None:
        super().__init__()
        self.conv = conv(width_in, block.width, block.kernel, block.stride)
        self.bn1 = nn.BatchNorm2d(block.width)
        self.act = activation(block.relu)


LAYERS: dict[str, Callable[[Block, int], nn.Module]] = {"ds": Separable, "ir": Inverted, "cn": Convolution}


def layer(block: Block, width_in: int) -> nn.Module:
    """One block, for maps of `width_in` channels."""
    return LAYERS[block.kind](block, width_in)


class HiddenHead(PooledCNN):
    """What is around the blocks: the stem, and behind the mean a hidden layer and the `classifier`.

    A subclass sets `self.blocks`, which gives maps of `last` channels, then calls `finish`.
    """

    def __init__(self, stem: int, last: int, features: int, *, architecture: str, args: dict[str, Any]) -> None:
        super().__init__(features, architecture=architecture, args=args)
        self.conv_stem, self.bn1 = conv(3, stem, 3, 2), nn.BatchNorm2d(stem)
        self.act = activation(relu=False)
        self.conv_head = nn.Conv2d(last, features, 1)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier of so many classes; 0 takes it away."""
        self.num_classes = num_classes
        self.classifier: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: stem, blocks or stages, the rest."""
        return {"stem": r"^conv_stem|^bn1", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}

    def start(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> what the first block gets, [B, stem, H / 2, W / 2]."""
        return self.act(self.bn1(self.conv_stem(images)))

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """The last maps [B, last, h, w] -> what `forward` returns, or what its classifier sees."""
        hidden = self.act(self.conv_head(maps.mean(dim=(2, 3), keepdim=True))).flatten(1)
        return hidden if pre_logits else self.classifier(hidden)


class Binas(HiddenHead):
    """`blocks.I.J` is block J of stage I."""

    def __init__(
        self, structure: Architecture | str, stem: int = STEM, features: int = FEATURES, num_classes: int = 0
    ) -> None:
        structure = parse(structure) if isinstance(structure, str) else structure
        args = {"structure": text(structure), "stem": stem, "features": features}
        super().__init__(stem, structure[-1][-1].width, features, architecture="binas", args=args)
        stages, width = [], stem
        for stage in structure:
            layers = []
            for block in stage:
                layers.append(layer(block, width))
                width = block.width
            stages.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*stages)
        self.finish(num_classes)

    def residual_blocks(self) -> list[nn.Module]:
        """Blocks by depth, but for convolutions; what they give is behind no ReLU."""
        return [module for module in self.modules() if isinstance(module, Residual)]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps, [B, last, h, w]; the features are those behind the hidden layer."""
        return self.blocks(self.start(images))


def binas(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        Binas, "binas", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(binas)
