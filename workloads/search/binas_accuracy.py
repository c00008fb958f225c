"""What the supernet of BINAS (arXiv 2110.12399) classifies rightly with some decisions fixed and all others random."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from workloads.data.keys import sample_keys
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.models.binas_space import Paths, Space
from workloads.models.binas_supernet import BinasSupernet
from workloads.search.base import SearchInputs
from workloads.search.bilinear import entry_of

HELD = 2**32  # bytes of decoded images that are kept between measurements


@dataclass(frozen=True)
class Fixed:
    """Decisions that are not random.

    Attributes:
        configuration: (stage, block) -> into `Space.configurations`.
        depth: stage -> into `Space.depths`.
    """

    configuration: dict[tuple[int, int], int] = field(default_factory=dict)
    depth: dict[int, int] = field(default_factory=dict)

    def of(self, paths: Paths) -> Paths:
        """The paths with these decisions, in place."""
        for (stage, block), configuration in self.configuration.items():
            paths.configuration[:, stage, block] = configuration
        for stage, depth in self.depth.items():
            paths.depth[:, stage] = depth
        return paths


def of_depth(space: Space, stage: int, depth: int) -> str:
    return f"stage {stage + 1} of {space.depths[depth]} blocks"


def of_block(space: Space, stage: int, block: int, configuration: int) -> str:
    return f"stage {stage + 1} block {block + 1} {space.configurations[configuration]}"


def decisions(space: Space) -> dict[str, Fixed]:
    """What is measured for the estimator; a block behind the first is looked at where its stage is just deep enough."""
    found = {"base": Fixed()}
    for s in range(len(space.widths)):
        found |= {of_depth(space, s, d): Fixed(depth={s: d}) for d in range(len(space.depths))}
        for b in range(space.max_depth):
            depth = {s: entry_of(space.depths, b)} if b else {}
            for c in range(len(space.configurations)):
                found[of_block(space, s, b, c)] = Fixed({(s, b): c}, depth)
    return found


class Accuracy:
    """Measures, with the weights that a job started from, on its stream `validation`."""

    def __init__(
        self, space: Space, inputs: SearchInputs, *, size: int, classes: int, passes: int, batch_size: int
    ) -> None:
        """Opens nothing yet.

        Args:
            space: of the supernet.
            inputs: weights, images and the device.
            size: side of the images.
            classes: of the supernet.
            passes: over the images, each time with other paths.
            batch_size: of the images.
        """
        self.space, self.inputs = space, inputs
        self.classes, self.passes, self.batch_size = classes, passes, batch_size
        self.view = View(size=size)
        self._held: list[dict[str, Any]] = []

    @torch.inference_mode()
    def __call__(self, fixed: Fixed) -> float:
        """Top-1 in %, the mean over images and passes; the random paths are the same each time.

        Raises:
            ValueError: weights or images are not those of such a supernet.
        """
        in_all = len(self.space.widths) * (self.space.max_depth + 1)
        whole = len(fixed.configuration) + len(fixed.depth) == in_all  # nothing is random
        right = torch.zeros((), dtype=torch.int64, device=self.inputs.device)
        count = 0
        for images, labels, index in self.batches():
            for number in range(1 if whole else self.passes):
                paths = fixed.of(self.space.random_paths(sample_keys(self.inputs.seed, number, index)))
                logits = self.supernet(images, Paths(*(part.to(images.device) for part in paths)))
                right += (logits.argmax(dim=1) == labels).sum()
                count += len(labels)
        return 100 * float(right) / count

    @cached_property
    def supernet(self) -> BinasSupernet:
        """With its weights."""
        supernet = BinasSupernet(self.space, self.classes)
        assert isinstance(supernet.classifier, nn.Linear)
        nn.init.constant_(supernet.classifier.bias, torch.nan)
        self.inputs.start(supernet)
        if supernet.classifier.bias.isnan().any():  # encoders may start from weights without a classifier
            raise ValueError(
                f"got weights without a classifier of {self.classes} classes, expected a supernet that "
                "method: {name: binas} trained; set classes to as many as its data have"
            )
        return supernet.eval().to(self.inputs.device)

    def batches(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Images [B, 3, H, W] and labels [B] on the device, and rows [B]; the first gigabytes are decoded once."""
        for step in range(self._reader.steps_per_epoch):
            if step == len(self._held) and sum(one["image"].nbytes for one in self._held) < HELD:
                self._held.append(self._reader.batch(step))
            batch = self._held[step] if step < len(self._held) else self._reader.batch(step)
            images = normalise(batch["image"].to(self.inputs.device), self.view)
            yield images, batch["label"].to(self.inputs.device), batch["index"]

    @cached_property
    def _reader(self) -> Reader:
        manifest = self.inputs.open("validation")
        if manifest.num_classes != self.classes or (manifest.label < 0).any():
            raise ValueError(
                f"got validation data of {manifest.num_classes} classes, {(manifest.label < 0).sum()} samples without "
                f"label, expected {self.classes} classes and a label of each; set classes, or name other data"
            )
        size = min(self.batch_size, len(manifest))
        return Reader(manifest, {"image": self.view}, batch_size=size, shuffle=False, drop_last=False)
