"""Networks of structure strings (Zen-NAS, Lin et al. 2021, arXiv 2102.01063), those of the paper by name.

Weights start as for the paper's training: Xavier normal with gain 3.26, and the last BatchNorm of each branch at 0, so
that each residual block starts as its shortcut. Squeeze-and-excitation is what the paper adds to its mobile networks
when they are trained; a search knows nothing of it.

Importing this module makes the architecture known to timm: after `import workloads.models.zennet` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.convolution import conv_norm
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.structure import EPS, Branch, String, Structure, StructureError, parse, parse_network, text
from workloads.models.timm_import import timm

GAIN = 3.26


@cache
def published() -> dict[str, dict[str, Any]]:
    """Name -> structure and image size of the networks that came with the paper."""
    networks: dict[str, dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("zennet.yaml").read_text())
    return networks


def _structure(string: str) -> str:
    if "(" not in string:
        raise StructureError(
            f"got structure {string[:60]!r}, expected a structure string or one of {', '.join(published())}"
        )
    return text(parse_network(string))


class ZenNetConfig(BaseModel):
    """`{name: zennet, structure: imagenet-0.1ms}`, or a structure string in place of the name.

    Attributes:
        structure: a name of the paper's networks (its image size is taken too, where none is given), or a string.
        image_size: only says what is fed in.
        se: squeeze-and-excitation behind the k x k convolutions of the body.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: Annotated[String, AfterValidator(_structure)]
    image_size: Size = 224
    se: bool = False

    @model_validator(mode="before")
    @classmethod
    def _of_the_paper(cls, fields: dict[str, Any]) -> dict[str, Any]:
        known = published().get(str(fields.get("structure")))
        return (
            fields
            if known is None
            else {"image_size": known["image_size"]} | fields | {"structure": known["structure"]}
        )

    def build(self) -> ZenNet:
        return ZenNet(parse(self.structure), se=self.se)


class SE(nn.Module):
    """Weighs channels by what the means of all of them say (Hu et al. 2018, arXiv 1709.01507)."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, round(0.25 * channels))
        squeeze, excite = conv_norm(channels, inner, eps=EPS), conv_norm(inner, channels, eps=EPS)
        self.weigh = nn.Sequential(nn.AdaptiveAvgPool2d(1), *squeeze, nn.ReLU(), *excite, nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weigh(x)


class Chain(nn.Module):
    """relu(f(x) + x), or relu(f(x)) where there is no shortcut."""

    def __init__(self, branch: Branch, *, se: bool) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for i, conv in enumerate(branch.convs):
            parts += conv_norm(conv.width_in, conv.width, conv.kernel, conv.stride, conv.groups, eps=EPS)
            if i < len(branch.convs) - 1:
                parts.append(nn.ReLU())
            if se and branch.residual and i == len(branch.convs) - 2:  # the k x k one: never the last of its branch
                parts.append(SE(conv.width))
        self.branch = nn.Sequential(*parts)
        self.shortcut: nn.Module | None = None
        if branch.residual:
            self.shortcut = nn.Identity()
        if branch.residual and branch.projects:
            first, last = branch.convs[0], branch.convs[-1]
            stride = max(conv.stride for conv in branch.convs)
            project = nn.Conv2d(first.width_in, last.width, 1, stride)
            self.shortcut = nn.Sequential(project, nn.BatchNorm2d(last.width, eps=EPS))

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return (y if self.shortcut is None else y + self.shortcut(x)).relu()


class ZenNet(PooledCNN):
    """`parts.I.J` is chain J of part I; the classifier is `fc`."""

    def __init__(self, structure: Structure | str, *, se: bool = False, num_classes: int = 0) -> None:
        structure = parse(structure) if isinstance(structure, str) else structure
        args = {"structure": text(structure), "se": se}
        super().__init__(structure[-1].width, architecture="zennet", args=args)
        self.parts = nn.Sequential(
            *(nn.Sequential(*(Chain(branch, se=se) for branch in part.branches())) for part in structure)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.xavier_normal_(module.weight, gain=GAIN)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for module in self.modules():
            if isinstance(module, Chain) and module.shortcut is not None:
                last = module.branch[-1]
                assert isinstance(last, nn.BatchNorm2d)
                nn.init.zeros_(last.weight)
        self.reset_classifier(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: the stem, chains or parts, the rest."""
        return {"stem": r"^parts\.0\.", "blocks": r"^parts\.(\d+)" if coarse else r"^parts\.(\d+)\.(\d+)"}

    def residual_blocks(self) -> list[nn.Module]:
        """Chains by depth, but for stem and tail."""
        return [module for module in self.modules() if isinstance(module, Chain) and module.shortcut is not None]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps behind their ReLU."""
        return self.parts(images)


def zennet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        ZenNet, "zennet", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(zennet)
