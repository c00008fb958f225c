"""GENet: GPU-efficient networks (Lin et al. 2020, arXiv 2006.14090): light, normal and large, and others of its blocks.

A GPU does full convolutions at a higher rate than separable ones, and the kernels of early layers have a high rank, of
late layers a low one: so blocks of full convolutions (XX) come first, then bottlenecks (BL), then inverted bottlenecks
with a convolution by channel (DW); few layers early, many late. "Light" is GENet_small in the released code. What the
convolutions start from is not in the paper: here it is that of our other networks.

Importing this module makes the architecture known to timm: after `import workloads.models.genet` an exported folder
loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
)
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.convolution import conv_norm
from workloads.models.pooled_cnn import PooledCNN
from workloads.models.structure import Channels, Layers
from workloads.models.timm_import import timm

RATIO = {"XX": 1.0, "BL": 0.25, "DW": 3.0}  # channels inside a layer by those that it gives


class Block(NamedTuple):
    """Some layers of one kind: `[BL, 384, 7, 2]`."""

    kind: Literal["XX", "BL", "DW"]
    channels: Channels
    layers: Layers
    stride: Literal[1, 2]  # of the first layer
    kernel: Literal[3, 5] = 3


def _block(value: Any, read: ValidatorFunctionWrapHandler) -> Block:
    """Errors that name the entry of a block, rather than its number in a list."""
    try:
        block: Block = read(value)
        return block
    except ValidationError as error:
        said = []
        for item in error.errors(include_url=False, include_context=False):
            at = item["loc"][0] if item["loc"] else None
            said.append(f"{Block._fields[at]}: {item['msg']}" if isinstance(at, int) else item["msg"])
        raise ValueError(
            f"got {value!r:.60}, expected [{', '.join(Block._fields)}] ({'; '.join(said)}); "
            'write one such as ["BL", 384, 7, 2]'
        ) from error


Blocks = Annotated[tuple[Annotated[Block, WrapValidator(_block)], ...], Field(min_length=1, max_length=100)]


class GENetConfig(BaseModel):
    """Any network of these blocks, between a convolution of 3 x 3 and stride 2, and one of 1 x 1 at the end."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    image_size: Size = 192
    stem: Channels
    blocks: Blocks
    last: Channels

    def build(self) -> GENet:
        return GENet(self.stem, self.blocks, self.last)


class GENetLight(GENetConfig):
    stem: Channels = 13
    blocks: Blocks = (
        Block("XX", 48, 1, 2),
        Block("XX", 48, 3, 2),
        Block("BL", 384, 7, 2),
        Block("DW", 560, 2, 2),
        Block("DW", 256, 1, 1),
    )
    last: Channels = 1920


class GENetNormal(GENetConfig):
    stem: Channels = 32
    blocks: Blocks = (
        Block("XX", 128, 1, 2),
        Block("XX", 192, 2, 2),
        Block("BL", 640, 6, 2),
        Block("DW", 640, 4, 2),
        Block("DW", 640, 1, 1),
    )
    last: Channels = 2560


class GENetLarge(GENetConfig):
    image_size: Size = 256
    stem: Channels = 32
    blocks: Blocks = (
        Block("XX", 128, 1, 2),
        Block("XX", 192, 2, 2),
        Block("BL", 640, 6, 2),
        Block("DW", 640, 5, 2),
        Block("DW", 640, 4, 1),
    )
    last: Channels = 2560


class Layer(nn.Module):
    """relu(f(x) + x); where the shape changes, x goes through a convolution of 1 x 1 with that stride."""

    def __init__(self, kind: str, width_in: int, width: int, stride: int, kernel: int) -> None:
        super().__init__()
        mid = round(width * RATIO[kind])
        if kind == "XX":
            parts = [conv_norm(width_in, mid, kernel, stride), nn.ReLU(), conv_norm(mid, width, kernel)]
        else:
            inner = conv_norm(mid, mid, kernel, stride, groups=mid if kind == "DW" else 1)
            parts = [conv_norm(width_in, mid, 1), nn.ReLU(), inner, nn.ReLU(), conv_norm(mid, width, 1)]
        self.branch = nn.Sequential(*parts)
        same = stride == 1 and width_in == width
        self.shortcut = nn.Identity() if same else conv_norm(width_in, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return (self.branch(x) + self.shortcut(x)).relu()


class GENet(PooledCNN):
    """`stem`, `blocks.I.J` for layer J of block I, `last`, and the classifier `fc`."""

    def __init__(self, stem: int, blocks: tuple[Block, ...], last: int, num_classes: int = 0) -> None:
        blocks = tuple(Block(*block) for block in blocks)  # of a JSON file they are lists
        args = {"stem": stem, "blocks": [list(block) for block in blocks], "last": last}
        super().__init__(last, architecture="genet", args=args)
        self.stem = nn.Sequential(*conv_norm(3, stem, 3, 2), nn.ReLU())
        made, width = [], stem
        for block in blocks:
            layers = []
            for i in range(block.layers):
                layers.append(Layer(block.kind, width, block.channels, 1 if i else block.stride, block.kernel))
                width = block.channels
            made.append(nn.Sequential(*layers))
        self.blocks = nn.Sequential(*made)
        self.last = nn.Sequential(*conv_norm(width, last, 1), nn.ReLU())
        self.finish(num_classes)

    def group_matcher(self, coarse: bool = False) -> dict[str, str]:
        """Patterns of the names of parameters by depth, for layer-wise decay: stem, layers or blocks, the rest."""
        return {"stem": r"^stem", "blocks": r"^blocks\.(\d+)" if coarse else r"^blocks\.(\d+)\.(\d+)"}

    def residual_blocks(self) -> list[nn.Module]:
        """Layers by depth."""
        return [module for module in self.modules() if isinstance(module, Layer)]

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps behind their ReLU, [B, num_features, H / 32, W / 32] of the published ones."""
        return self.last(self.blocks(self.stem(images)))


def genet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        GENet, "genet", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(genet)
