"""A block in another one's place: distilled from what it replaces, then judged in the whole network.

Where the new block gives another number of channels, a linear 1 x 1 convolution behind it brings them back for the
rest, which expects the old number. As nothing comes between it and the first convolutions of the next block, it could
be multiplied into them: so what is judged is a network of the space, whose next block takes the new number in.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator
from contextlib import closing

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.manifest import DataError, Manifest
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.models.genet import GENet, GENetConfig

BATCH_SIZE = 256  # of images that are only looked at


def labelled(manifest: Manifest) -> Manifest:
    """The same samples.

    Raises:
        DataError: some have no label.
    """
    if manifest.num_classes < 2 or (manifest.label < 0).any():
        raise DataError(
            f"got {int((manifest.label < 0).sum())} of {len(manifest)} samples of val without label, expected a .cls "
            "member in each; hold out labelled ones"
        )
    return manifest


def in_order(manifest: Manifest, size: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """Normalised images [B, 3, H, W] and labels [B], each once."""
    view = View(size=size)
    reader = Reader(
        manifest, {"image": view}, batch_size=min(BATCH_SIZE, len(manifest)), shuffle=False, drop_last=False
    )
    with closing(reader.batches(0, reader.steps_per_epoch)) as stream:
        for batch in stream:
            yield normalise(batch["image"].to(device), view), batch["label"].to(device)


def shuffled(
    manifest: Manifest, size: int, device: torch.device, *, batch_size: int, steps: int, seed: int
) -> Iterator[Tensor]:
    """So many batches of normalised images [B, 3, H, W], half of them mirrored; the same for each seed."""
    view = View(size=size, flip=0.5)
    reader = Reader(manifest, {"image": view}, batch_size=min(batch_size, len(manifest)), seed=seed)
    with closing(reader.batches(0, steps)) as stream:
        for batch in stream:
            yield normalise(batch["image"].to(device), view)


@torch.inference_mode()
def accuracy(network: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> float:
    """Share of images that get their label, in eval mode."""
    right = [(network.eval()(images).argmax(dim=1) == label).float() for images, label in batches]
    return float(torch.cat(right).mean())


def fresh(network: GENetConfig, at: int, width: int) -> nn.Sequential:
    """Block `at` of a network as it starts, made to give `width` channels."""
    block = network.build().blocks[at]
    channels = network.blocks[at].channels
    if channels == width:
        return nn.Sequential(block)
    return nn.Sequential(block, nn.Conv2d(channels, width, 1, bias=False))


def distil(block: nn.Module, master: GENet, at: int, batches: Iterable[Tensor], *, steps: int, lr: float) -> None:
    """Trains a block to give what block `at` of the master gives, from the same maps; nothing else changes.

    The loss is the mean square of the difference over that of the master's maps, the optimizer Adam, the rate a half
    cosine.

    Args:
        block: what is trained, where `master` is.
        master: a trained network in eval mode.
        at: number of the block.
        batches: of images.
        steps: how many there are.
        lr: at the start.
    """
    block.train()
    optimizer = torch.optim.Adam(block.parameters(), lr)
    for step, images in enumerate(batches):
        with torch.no_grad():
            x = master.blocks[:at](master.stem(images))
            y = master.blocks[at](x)
        optimizer.param_groups[0]["lr"] = lr * (1 + math.cos(math.pi * step / steps)) / 2
        optimizer.zero_grad()
        (F.mse_loss(block(x), y) / y.square().mean().clamp_min(1e-12)).backward()
        optimizer.step()


def with_block(master: GENet, at: int, block: nn.Module) -> GENet:
    """The master with another block; the others are the master's own."""
    network = copy.copy(master)
    network._modules = dict(master._modules)
    network.blocks = nn.Sequential(*(block if i == at else own for i, own in enumerate(master.blocks)))
    return network
