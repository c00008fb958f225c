"""Linear separability of mixed inputs (i-MAE, Zhang and Shen 2022, arXiv 2210.11470).

An encoder sees a mixture of two images through a mask. How far is a linear map of its
tokens from what a plain MAE (`reference`: encoder and the layer that feeds its decoder)
says of one of the two images, clean and through the same mask? The distance is the mean
square of the difference of features that are normalised by token (LayerNorm without
weights): 0 is equal, 2 unrelated; lower is more separable.

    own_layer     by the layer that the method trained for it, where it has one: the paper's number
    pretrained    by a map of its encoder's tokens, fitted to mixtures of training images by least squares
    reference     by such a map of the plain MAE's tokens
    untrained     by such a map of the encoder's tokens before it was trained
    constant      by the mean of the clean tokens: what knowing nothing costs

The protocol is ours, since the paper's was never released. `separability.html`, beside the
result, draws the distance over the weight of the subordinate image. Maps are fitted for
each weight anew; `own_layer` is what it is.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from functools import partial
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from workloads import artifact, assemble
from workloads.chart import Chart, write_chart
from workloads.data.keys import uniform
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.evaluation.base import EvaluationConfig, Subject, summary
from workloads.evaluation.features import BATCH_SIZE, plain_view
from workloads.models.vit import ViT, plain_vit
from workloads.parts.frozen import Frozen, Teacher
from workloads.parts.mae_decoder import MAEDecoder
from workloads.parts.masking import Mask, expect_visible, random_masking, take
from workloads.spec import Stream

Tokens: TypeAlias = Callable[[Tensor, Mask], Tensor]
"""Images as the subject's view normalises them, [B, 3, H, W] -> CLS and visible tokens, [B, 1 + K, D]."""


class SeparabilityConfig(EvaluationConfig):
    reference: str  # a plain MAE with its decoder: name@version, job:<id> or a folder
    target: Literal["subordinate", "dominant"] = "subordinate"  # the image that is looked for
    a: float = Field(default=0.3, gt=0, lt=0.5)  # weight of the subordinate image in the result
    sweep: tuple[Annotated[float, Field(gt=0, lt=0.5)], ...] = (0.1, 0.2, 0.3, 0.4)  # and in the picture
    mask_ratio: float = Field(default=0.5, gt=0, lt=1)
    pairs: int = Field(default=2048, ge=2)  # of each split, rounded up to whole batches


class LinearMap:
    """Least squares y = W x + c, from sums over batches in float64."""

    def __init__(self, inputs: int, outputs: int) -> None:
        self._xx = torch.zeros(inputs + 1, inputs + 1, dtype=torch.float64)
        self._xy = torch.zeros(inputs + 1, outputs, dtype=torch.float64)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Adds observations: x [..., D], y [..., E]."""
        x1 = F.pad(x.flatten(0, -2).double(), (0, 1), value=1.0)  # [n, D + 1]
        self._xx += x1.T @ x1
        self._xy += x1.T @ y.flatten(0, -2).double()

    def solve(self) -> Callable[[Tensor], Tensor]:
        """The map [..., D] -> [..., E]; the smallest solution: behind a LayerNorm channels depend on each other."""
        solution = (torch.linalg.pinv(self._xx, hermitian=True) @ self._xy).float()  # [D + 1, E]
        return lambda x: x @ solution[:-1] + solution[-1]


def standard(tokens: Tensor) -> Tensor:
    """Each token [..., E] by its own mean and deviation."""
    return F.layer_norm(tokens, tokens.shape[-1:])


def distance(z: Tensor, t: Tensor) -> float:
    """Mean square of the difference of normalised tokens [..., E]: 2 (1 - their correlation)."""
    return float((standard(z) - standard(t)).square().mean())


def encode(vit: ViT, images: Tensor, mask: Mask) -> Tensor:
    return vit.encode(take(vit.embed(images), mask.ids_keep))


class Separability:
    Config: ClassVar[type[EvaluationConfig]] = SeparabilityConfig

    def run(self, config: SeparabilityConfig, subject: Subject) -> dict[str, Any] | None:
        view = plain_view(subject)
        models = subject.encoders(untrained=config.untrained)
        vits = {who: plain_vit(model, "tokens are dropped inside the encoder") for who, model in models.items()}
        vit = vits["pretrained"]
        expect_visible(vit.config.grid**2, config.mask_ratio)
        reference, clean = plain_mae(config.reference, subject, view, vit)
        encoders: dict[str, Tokens] = {who: partial(encode, encoder) for who, encoder in vits.items()}
        encoders["reference"] = reference
        encoders["constant"] = lambda images, mask: images.new_empty(len(images), 1 + mask.ids_keep.shape[1], 0)
        own = own_layer(config, subject)
        found: dict[str, dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
        for seed in config.seeds:
            for a in sorted({config.a, *config.sweep}):
                if subject.should_stop():
                    return None
                of = partial(pairs, config, view, vit.config.grid, seed, a)
                train, test = of(config.data.train), of(config.data.test)
                for who, value in distances(train, test, encoders, clean, own).items():
                    found[who][a].append(value)
        curves = {who: [(a, summary(values)) for a, values in by_a.items()] for who, by_a in found.items()}
        picture = subject.folder / "separability.html"
        chart: Chart = {
            "title": f"Linear separability: the {config.target} image of a mixture",
            "x": "weight of the subordinate image",
            "y": "distance (0 equal, 2 unrelated)",
            "curves": curves,
        }
        write_chart(picture, chart)
        results = {who: summary(by_a[config.a]) for who, by_a in found.items()}
        told = {"label": "separability", "metric": "distance", "results": results}
        return told | {"chart": chart, "picture": picture.name}


def plain_mae(name: str, subject: Subject, view: View, vit: ViT) -> tuple[Tokens, Tokens]:
    """The tokens of the reference, and these at the width of its decoder.

    Raises:
        ValueError: it has no decoder, or other patches than the subject.
    """
    folder = artifact.resolve(name, subject.home)
    method: Any = assemble.restore_method(folder, subject.home)
    card = artifact.read_card(folder)
    encoder, decoder = getattr(method, "encoder", None), getattr(method, "decoder", None)
    if not isinstance(encoder, ViT) or not isinstance(decoder, MAEDecoder):
        raise ValueError(
            f"got reference {name} of method {card.spec.method.name!r}, expected one with encoder and decoder; "
            "name the artifact of a job of MAE"
        )
    ours, theirs = vit.config, encoder.config
    if (ours.image_size, ours.patch_size) != (theirs.image_size, theirs.patch_size):
        raise ValueError(
            f"got reference {name} of image_size={theirs.image_size}, patch_size={theirs.patch_size} for "
            f"image_size={ours.image_size}, patch_size={ours.patch_size}, expected the same patches; name another"
        )
    known = Teacher(Frozen(method, View(size=card.image_size, mean=card.mean, std=card.std)), view)

    def tokens(images: Tensor, mask: Mask) -> Tensor:
        return encode(encoder, known.see(images), mask)

    return tokens, lambda images, mask: decoder.embed(tokens(images, mask))


def own_layer(config: SeparabilityConfig, subject: Subject) -> Tokens | None:
    """What the subject's method itself separates of a mixture, if it does (`separate`) and that image is asked for."""
    if not artifact.read_card(subject.artifact).reconstructs:
        return None
    method: Any = assemble.restore_method(subject.artifact, subject.home)
    if config.target not in getattr(method, "branches", ()):
        return None
    return lambda images, mask: method.separate(method.encode(images, mask))[config.target]


def pairs(
    config: SeparabilityConfig, view: View, grid: int, seed: int, a: float, stream: Stream
) -> Iterator[tuple[Tensor, Tensor, Mask]]:
    """Mixtures of images and their partners (the next one of a shuffled batch), the images that are looked for, masks.

    Both [B, 3, H, W], normalised.
    """
    manifest = assemble.open_stream(stream)
    size = min(BATCH_SIZE, config.pairs, len(manifest))
    reader = Reader(manifest, {"image": view}, batch_size=size, seed=seed)
    steps = min(math.ceil(config.pairs / size), reader.steps_per_epoch)
    with closing(reader.batches(0, steps)) as batches:
        for batch in batches:
            one = normalise(batch["image"], view)
            two = one.roll(1, dims=0)
            noise = uniform(batch["key"], grid**2, salt="separability.mask")
            wanted = one if config.target == "subordinate" else two
            yield torch.lerp(two, one, a), wanted, random_masking(noise, config.mask_ratio)


@torch.inference_mode()
def distances(
    train: Iterable[tuple[Tensor, Tensor, Mask]],
    test: Iterable[tuple[Tensor, Tensor, Mask]],
    encoders: Mapping[str, Tokens],
    clean: Tokens,
    own: Tokens | None,
) -> dict[str, float]:
    """Fits a map of each encoder on the pairs of `train`, and measures on those of `test`."""
    maps: dict[str, LinearMap] = {}
    for mixed, wanted, mask in train:
        t = standard(clean(wanted, mask))
        for who, encoder in encoders.items():
            z = encoder(mixed, mask)
            maps.setdefault(who, LinearMap(z.shape[-1], t.shape[-1])).add(z, t)
    solved = {who: linear.solve() for who, linear in maps.items()}
    values: dict[str, list[float]] = defaultdict(list)
    for mixed, wanted, mask in test:
        t = clean(wanted, mask)
        for who, linear in solved.items():
            values[who].append(distance(linear(encoders[who](mixed, mask)), t))
        if own is not None:
            values["own_layer"].append(distance(own(mixed, mask), t))
    return {who: statistics.fmean(each) for who, each in values.items()}
