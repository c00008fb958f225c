"""The supernet of BINAS (Nayman et al. 2022, arXiv 2110.12399): every network of a space in one set of weights.

Weights are nested: a smaller expansion is the first channels of the largest, a smaller kernel the middle of the
largest. Each image of a batch may take another path: blocks compute all channels and all kernels, then what an image
does not take is masked.

BatchNorm is safe for such batches. A running statistic never mixes what passes no network in common: there is one for
each kernel, and blocks behind the end of a stage see what they would see if they were not. What is left is mixed over
configurations, equally in training and evaluation, so that no path needs statistics of its own. Gain and bias behind
the last convolution are for each expansion and squeeze-and-excitation, as in slimmable networks.

In the released code each kernel has weights of its own, so the smaller ones start from nothing when the largest
network is trained; here they start as the middle of what was learned.

Importing this module makes the architecture known to timm: after `import workloads.models.binas_supernet` an exported
folder loads with `timm.create_model("local-dir:FOLDER", pretrained=True)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.views import Size
from workloads.models.architecture import mobile8
from workloads.models.binas import Convolution, HiddenHead, Separable, SqueezeExcite, activation
from workloads.models.binas_space import Paths, Space
from workloads.models.convolution import conv
from workloads.models.timm_import import timm


class BinasSupernetConfig(Space):
    """`{name: binas_supernet}`; `image_size` only says what is fed in."""

    image_size: Size = 224

    def build(self) -> BinasSupernet:
        return BinasSupernet(self.model_dump(exclude={"image_size"}))


class Elastic(nn.Module):
    """An inverted residual in all its configurations at once."""

    def __init__(self, space: Space, stage: int, block: int, width_in: int) -> None:
        super().__init__()
        largest = space.block(stage, block, -1)
        mid, width = largest.inside(width_in), largest.width
        self.configurations = space.configurations
        self.kernels, self.with_se = space.kernels, space.se
        self.mids = [mobile8(width_in * expansion) for expansion in space.expansions]
        self.act = activation(largest.relu)
        self.conv_pw, self.bn1 = conv(width_in, mid), nn.BatchNorm2d(mid)
        self.conv_dw = conv(mid, mid, largest.kernel, largest.stride, mid)
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(mid, affine=False) for _ in self.kernels)
        self.gain2 = nn.Parameter(torch.ones(len(self.kernels), mid))
        self.bias2 = nn.Parameter(torch.zeros(len(self.kernels), mid))
        self.se = SqueezeExcite(mid) if largest.se else None
        self.conv_pwl, self.bn3 = conv(mid, width), nn.BatchNorm2d(width, affine=False)
        self.gain3 = nn.Parameter(torch.ones(len(self.mids) * len(self.with_se), width))
        self.bias3 = nn.Parameter(torch.zeros(len(self.mids) * len(self.with_se), width))
        self.residual = largest.stride == 1 and width_in == width

    def forward(self, x: Tensor, chosen: Tensor | None, keep: Tensor | None) -> Tensor:
        """[B, C, H, W] -> [B, C', H', W'].

        Args:
            x: maps.
            chosen: int64 [B], the configuration of each image; None: the largest.
            keep: [B], what the branch beside a shortcut is multiplied by; None: 1.
        """
        y = self.act(self.bn1(self.conv_pw(x)))
        if chosen is None:
            y = self.act(self._spatial(y, -1))
            y = self.se(y) if self.se is not None else y
            y = affine(self.bn3(self.conv_pwl(y)), self.gain3[-1:], self.bias3[-1:])
        else:
            y = self._chosen(y, chosen)
        if not self.residual:
            return y
        return x + (y if keep is None else y * keep.to(y.dtype)[:, None, None, None])

    def _chosen(self, y: Tensor, chosen: Tensor) -> Tensor:
        se = chosen % len(self.with_se)
        rest = chosen.div(len(self.with_se), rounding_mode="floor")
        kernel, expansion = rest % len(self.kernels), rest.div(len(self.kernels), rounding_mode="floor")
        spatial = sum(self._spatial(y, i) * (kernel == i)[:, None, None, None] for i in range(len(self.kernels)))
        y = self.act(spatial * first(self.mids, expansion, y.shape[1]))
        if self.se is not None:
            excited = self.se(y, first([mobile8(mid / 4) for mid in self.mids], expansion, mobile8(self.mids[-1] / 4)))
            on = torch.tensor(self.with_se, device=y.device)[se]
            y = torch.where(on[:, None, None, None], excited, y)
        row = expansion * len(self.with_se) + se
        return affine(self.bn3(self.conv_pwl(y)), self.gain3[row], self.bias3[row])

    def _spatial(self, y: Tensor, kernel: int) -> Tensor:
        return affine(
            self.bn2[kernel](F.conv2d(y, **self._middle(kernel))), self.gain2[kernel][None], self.bias2[kernel][None]
        )

    def _middle(self, kernel: int) -> dict[str, Any]:
        """Arguments of the convolution with one of the kernels."""
        size, dw = self.kernels[kernel], self.conv_dw
        cut = (dw.kernel_size[0] - size) // 2
        weight = dw.weight[:, :, cut : cut + size, cut : cut + size]
        return {"weight": weight, "stride": dw.stride, "padding": size // 2, "groups": dw.groups}

    def weights(self, configuration: int) -> dict[str, Tensor]:
        """Those of the block `models.binas.Inverted` with this configuration, by its names."""
        chosen = self.configurations[configuration]
        row2 = self.kernels.index(chosen.kernel)
        width = configuration // (len(self.kernels) * len(self.with_se))
        row3 = width * len(self.with_se) + self.with_se.index(chosen.se)
        mid = self.mids[width]
        bn2 = self.bn2[row2].state_dict() | {"weight": self.gain2[row2], "bias": self.bias2[row2]}
        bn3 = self.bn3.state_dict() | {"weight": self.gain3[row3], "bias": self.bias3[row3]}
        found = {
            "conv_pw.weight": self.conv_pw.weight[:mid],
            **{f"bn1.{name}": value[:mid] if value.ndim else value for name, value in self.bn1.state_dict().items()},
            "conv_dw.weight": self._middle(row2)["weight"][:mid],
            **{f"bn2.{name}": value[:mid] if value.ndim else value for name, value in bn2.items()},
            "conv_pwl.weight": self.conv_pwl.weight[:, :mid],
            **{f"bn3.{name}": value for name, value in bn3.items()},
        }
        if chosen.se and self.se is not None:
            reduce, expand, inner = self.se.conv_reduce, self.se.conv_expand, mobile8(mid / 4)
            assert reduce.bias is not None and expand.bias is not None
            found |= {"se.conv_reduce.weight": reduce.weight[:inner, :mid], "se.conv_reduce.bias": reduce.bias[:inner]}
            found |= {"se.conv_expand.weight": expand.weight[:mid, :inner], "se.conv_expand.bias": expand.bias[:mid]}
        return {name: value.detach().clone() for name, value in found.items()}


def affine(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    """[B, C, H, W] by [B or 1, C] each."""
    return x * gain.to(x.dtype)[:, :, None, None] + bias.to(x.dtype)[:, :, None, None]


def first(counts: Sequence[int], which: Tensor, channels: int) -> Tensor:
    """Which of the channels are among the first counts[which], for which [B]: bool [B, channels, 1, 1]."""
    limit = torch.tensor(list(counts), device=which.device)[which]
    return (torch.arange(channels, device=which.device) < limit[:, None])[:, :, None, None]


class BinasSupernet(HiddenHead):
    """`blocks.I.J` is block J of stage I - 1; before and behind the stages are blocks of all networks.

    Called with images alone it is its largest network.
    """

    def __init__(self, space: Space | dict[str, Any], num_classes: int = 0) -> None:
        space = Space.model_validate(space if isinstance(space, dict) else space.model_dump())
        args = {"space": space.model_dump(mode="json")}
        super().__init__(space.stem, space.last, space.features, architecture="binas_supernet", args=args)
        self.space = space
        largest = space.architecture([[-1] * space.max_depth] * len(space.widths), [-1] * len(space.widths))
        stages: list[nn.Module] = [nn.ModuleList([Separable(largest[0][0], space.stem)])]
        width = space.first
        for stage, width_out in enumerate(space.widths):
            widths = [width, *[width_out] * (space.max_depth - 1)]
            stages.append(nn.ModuleList(Elastic(space, stage, block, w) for block, w in enumerate(widths)))
            width = width_out
        stages.append(nn.ModuleList([Convolution(largest[-1][0], width)]))
        self.blocks = nn.ModuleList(stages)
        self.finish(num_classes)

    def maps(self, images: Tensor, path: Paths | None = None, keep: Tensor | None = None) -> list[Tensor]:
        """What stem, stages and the blocks around these give, in order.

        Args:
            images: [B, 3, H, W].
            path: of each image; None: the largest network.
            keep: [B, stages x max_depth], factors of the branches beside shortcuts (stochastic depth); None: 1.
        """
        found = [self.start(images)]
        found.append(self.blocks[0][0](found[-1]))  # type: ignore[index]
        for s in range(len(self.space.widths)):
            x, ends, stage = found[-1], [], self.blocks[s + 1]
            assert isinstance(stage, nn.ModuleList)
            for b, block in enumerate(stage):
                chosen = None if path is None else path.configuration[:, s, b]
                x = block(x, chosen, None if keep is None else keep[:, s * self.space.max_depth + b])
                ends.append(x)
            if path is not None:
                offered = torch.stack(ends[self.space.min_depth - 1 :])
                x = offered[path.depth[:, s], torch.arange(len(images), device=images.device)]
            found.append(x)
        found.append(self.blocks[-1][0](found[-1]))  # type: ignore[index]
        return found

    def forward_features(self, images: Tensor, path: Paths | None = None) -> Tensor:
        """[B, 3, H, W] -> the last maps, [B, last, h, w]."""
        return self.maps(images, path)[-1]

    def forward(self, images: Tensor, path: Paths | None = None) -> Tensor:
        """[B, 3, H, W] -> features [B, num_features], or logits [B, num_classes]."""
        return self.forward_head(self.forward_features(images, path))

    def weights_of(self, configurations: Sequence[Sequence[int]], depths: Sequence[int]) -> dict[str, Tensor]:
        """Those of the network `Space.architecture` of the same arguments, by the names of `models.binas.Binas`."""
        found = {
            name: value.detach().clone()
            for name, value in self.state_dict().items()
            if not name.startswith("blocks.") or name.split(".")[1] in ("0", str(len(self.blocks) - 1))
        }
        for s, depth in enumerate(depths):
            for b in range(self.space.depths[depth]):
                block = self.blocks[s + 1][b]  # type: ignore[index]
                assert isinstance(block, Elastic)
                weights = block.weights(configurations[s][b])
                found |= {f"blocks.{s + 1}.{b}.{name}": value for name, value in weights.items()}
        return found


def binas_supernet(pretrained: bool = False, **options: Any) -> nn.Module:
    """By this name in an exported `config.json` timm finds the network."""
    network: nn.Module = timm.models.build_model_with_cfg(
        BinasSupernet, "binas_supernet", pretrained, kwargs_filter=("in_chans", "global_pool"), **options
    )
    return network


timm.models.register_model(binas_supernet)
