"""What our networks of convolutions share: maps, their mean over all places, and a classifier."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class PooledCNN(nn.Module):
    """A network whose `forward_features` gives the last maps behind their ReLU, and the classifier `fc` on their mean.

    What timm's ResNets offer beside that is offered here by the same names, so whoever uses those can use these. A
    subclass sets up its layers, then calls `finish`.

    Attributes:
        num_features: channels of the last maps.
        num_classes: 0: an encoder, which returns the mean.
        default_cfg: the name of the architecture in timm.
        manta_args: arguments with which timm builds the same network.
    """

    def __init__(self, num_features: int, *, architecture: str, args: dict[str, Any]) -> None:
        super().__init__()
        self.default_cfg, self.manta_args = {"architecture": architecture}, args
        self.num_features = num_features

    def finish(self, num_classes: int) -> None:
        """Draws the convolutions (He et al. 2015, by the number of outputs), then the classifier."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        self.reset_classifier(num_classes)

    def reset_classifier(self, num_classes: int) -> None:
        """A fresh classifier of so many classes; 0 takes it away."""
        self.num_classes = num_classes
        self.fc: nn.Module = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def forward_features(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> the last maps, [B, num_features, h, w]."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_features(images)")

    def residual_blocks(self) -> list[nn.Module]:
        """By depth, those whose maps a student and its teacher compare; none of a subclass that names none."""
        return []

    def forward_head(self, maps: Tensor, pre_logits: bool = False) -> Tensor:
        """What `forward_features` returns -> what `forward` does, or what its classifier sees."""
        pooled = maps.mean(dim=(2, 3))
        return pooled if pre_logits else self.fc(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> features [B, num_features], or logits [B, num_classes]."""
        return self.forward_head(self.forward_features(images))
