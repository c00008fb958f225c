"""MAE-DET (Sun et al. 2022, arXiv 2111.13336): S, M and L, backbones of detectors, and others of their blocks.

A chain of residual blocks, from whose stages a detector takes maps: `pyramid` gives C3 to C5 for an FPN, and timm's
`features_only` works as with its own networks. A shortcut takes means of 2 x 2 before its convolution, where its block
has a stride. It is an encoder and a classifier too, by the mean of the last maps. What the convolutions start from is
not in the paper: here it is that of our other networks.

Importing this module makes the architecture known to timm: after `import workloads.models.maedet` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`, the maps of its stages with `features_only=True`.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.convolution import conv_norm
from workloads.models.maedet_structure import Structure, parse, plain, stages, strides
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.structure import Branch, StructureError
from workloads.models.timm_import import timm


@cache
def published() -> dict[str, Structure]:
    """The networks that came with the paper."""
    networks = yaml.safe_load(Path(__file__).with_name("maedet.yaml").read_text())
    return {name: parse(blocks) for name, blocks in networks.items()}


def _named(value: Any) -> Structure:
    if isinstance(value, str) and not value.lstrip().startswith("["):
        if value not in published():
            raise StructureError(
                f"got structure {value[:60]!r}, expected a list of blocks or one of {', '.join(published())}"
            )
        return published()[value]
    return parse(value)


class MAEDetConfig(BaseModel):
    """`{name: maedet, structure: S}`, or a list of blocks in place of the name, also as JSON text.

    Attributes:
        structure: what it is made of.
        image_size: only says what is fed in; the paper's networks were searched at 480.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    structure: Annotated[Structure, BeforeValidator(_named, json_schema_input_type=str | Structure)]
    image_size: Size = 480

    def build(self) -> MAEDet:
        return MAEDet(self.structure)


class Layer(nn.Module):
    """relu(f(x) + x), or relu(f(x)) where there is no shortcut."""

    def __init__(self, branch: Branch) -> None:
        super().__init__()
        parts: list[nn.Module] = []
        for conv in branch.convs:
            parts += [*conv_norm(conv.width_in, conv.width, conv.kernel, conv.stride), nn.ReLU()]
        self.branch = nn.Sequential(*parts[:-1])
        self.shortcut = _shortcut(branch) if branch.residual else None

    def forward(self, x: Tensor) -> Tensor:
        y = self.branch(x)
        return (y if self.shortcut is None else y + self.shortcut(x)).relu()


def _shortcut(branch: Branch) -> nn.Sequential:
    """Means of 2 x 2, at odd borders of what is there, then a convolution of 1 x 1, each where it is needed."""
    width_in, width = branch.convs[0].width_in, branch.convs[-1].width
    parts: list[nn.Module] = []
    if any(conv.stride == 2 for conv in branch.convs):
        parts.append(nn.AvgPool2d(2, ceil_mode=True))  # as a convolution of stride 2 rounds; for even sizes the same
    if branch.projects:
        parts += conv_norm(width_in, width)
    return nn.Sequential(*parts)


class MAEDet(PooledCNN):
    """`blocks.I.J` is layer J of block I; the classifier is `fc`.

    Attributes:
        strides: pixels between two places of the maps of each stage.
        channels: of them.
        feature_info: the same as timm says it of its networks.
    """

    def __init__(self, structure: Structure | Sequence[dict[str, Any]] | str, num_classes: int = 0) -> None:
        structure = parse(structure)  # of a JSON file the blocks are dicts
        super().__init__(structure[-1].width, architecture="maedet", args={"structure": plain(structure)})
        self.blocks = nn.Sequential(
            *(
                nn.Sequential(*(Layer(branch) for branch, count in block.parts() for _ in range(count)))
                for block in structure
            )
        )
        self._ends = stages(structure)
        self.strides = tuple(strides(structure)[i] for i in self._ends)
        self.channels = tuple(structure[i].width for i in self._ends)
        self.feature_info = [
            {"num_chs": width, "reduction": stride, "module": f"blocks.{i}"}
            for i, stride, width in zip(self._ends, self.strides, self.channels, strict=True)
        ]
        self.finish(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: stem, layers or blocks, the rest."""
        return {"stem": r"^blocks\.0\.", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}

    def residual_blocks(self) -> list[nn.Module]:
        """Layers by depth, but for the stem."""
        return [module for module in self.modules() if isinstance(module, Layer) and module.shortcut is not None]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps behind their ReLU, [B, num_features, H / 32, W / 32] of the published ones."""
        return self.blocks(images)

    def pyramid(self, images: Tensor, levels: Sequence[int] = (3, 4, 5)) -> list[Tensor]:
        """[B, 3, H, W] -> C_l of each level l, the maps at the end of the stage of stride 2^l, for an FPN.

        Raises:
            ValueError: a level that no stage has.
        """
        known = {stride.bit_length() - 1: end for end, stride in zip(self._ends, self.strides, strict=True)}
        if unknown := [level for level in levels if level not in known]:
            raise ValueError(f"got levels {unknown}, expected some of {list(known)}: its stages have {self.strides}")
        maps, x = {}, images
        for i, block in enumerate(list(self.blocks)[: max(known[level] for level in levels) + 1]):
            maps[i] = x = block(x)
        return [maps[known[level]] for level in levels]


def maedet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        MAEDet,
        "maedet",
        pretrained,
        kwargs_filter=("in_chans", "global_pool"),
        feature_cfg={"flatten_sequential": True},
        **options,
    )
    return network


timm.models.register_model(maedet)
