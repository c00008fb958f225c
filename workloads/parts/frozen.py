"""Frozen networks: what a reference is loaded as, and how a method asks it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.views import View


class Frozen(nn.Module):
    """A teacher: eval mode for ever, no gradients, outside parameters and checkpoint of whoever holds it.

    Holders keep it out of their module tree: by `Teacher`, or inside a tuple.

    Attributes:
        view: size and normalisation of the images that it knows; None where nobody said.
    """

    def __init__(self, module: nn.Module, view: View | None = None) -> None:
        super().__init__()
        self.module = module.eval().requires_grad_(False)
        self.view = view

    def train(self, mode: bool = True) -> Frozen:
        return super().train(False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)


class Teacher:
    """No nn.Module: so it is no part of the method, its parameters, DDP or its checkpoint.

    Attributes:
        module: the network; call it under `torch.no_grad()`, with what `see` returns.
        width: of its features.
    """

    def __init__(self, frozen: Frozen, view: View) -> None:
        """A teacher.

        Args:
            frozen: what `Inputs.load` returned.
            view: how the student's images are normalised.
        """
        self._frozen, self._view = frozen, view
        self.module: nn.Module = frozen.module
        self.width = int(getattr(self.module, "num_features", 0))

    def see(self, images: Tensor, size: int | None = None) -> Tensor:
        """The student's images [B, 3, H, W], normalised and resized (bilinear) as the teacher knows them.

        The teacher follows them to their device.

        Args:
            images: as the view of the student normalises them.
            size: pixels of a side; None leaves it.
        """
        if next(self.module.parameters()).device != images.device:
            self.module.to(images.device)
        theirs = self._frozen.view
        if theirs is not None and (theirs.mean, theirs.std) != (self._view.mean, self._view.std):
            mean, std, their_mean, their_std = (
                torch.tensor(values, device=images.device, dtype=images.dtype)[:, None, None]
                for values in (self._view.mean, self._view.std, theirs.mean, theirs.std)
            )
            images = (images * std + mean - their_mean) / their_std
        if size is not None and size != images.shape[-1]:
            images = F.interpolate(images, (size, size), mode="bilinear", align_corners=False, antialias=True)
        return images
