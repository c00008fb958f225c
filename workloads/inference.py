"""An artifact that answers: bytes of images in, classes, features or reconstructions out.

The preprocessing is that of the evaluations: no augmentation, the size and the
normalisation of the card.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from workloads import artifact
from workloads.data.decode import MAX_PIXELS, ImageError, decode
from workloads.data.transforms.image import execute, normalise
from workloads.data.views import View, height_width
from workloads.methods.base import Method

__all__ = ["ImageError", "Model"]

TOP = 5  # classes in an answer
CHUNK = 64  # images in one forward: a request of any length needs the memory of this many


class Model:
    """One artifact in memory, in eval mode; several threads may call it at once."""

    def __init__(self, folder: Path, home: Path = Path(), *, max_pixels: int = MAX_PIXELS) -> None:
        """Loads the network; the state of its method is loaded by the first `reconstruct`.

        Args:
            folder: the artifact.
            home: where the method finds its teachers, if it has any.
            max_pixels: of an image that is asked about.

        Raises:
            artifact.ArtifactError: no artifact, or weights that are not those of its card.
        """
        self.card = artifact.read_card(folder)
        self._folder, self._home, self._max_pixels = folder, home, max_pixels
        self._network = artifact.load_model(folder)
        self._view = View(size=self.card.image_size, mean=self.card.mean, std=self.card.std)

    def predict(self, images: Sequence[bytes]) -> list[dict[str, Any]]:
        """The most probable classes of each image: `{"label", "index", "probabilities": {label: p}}`, top 5.

        Args:
            images: encoded (JPEG, PNG, ...).

        Raises:
            ValueError: the artifact is an encoder.
            ImageError: bytes that are no image, or too many pixels; says the position.
        """
        self.expect_classifier()
        return self.classify(self.decode(images))

    def embed(self, images: Sequence[bytes]) -> list[list[float]]:
        """Pooled features of each image, `card.num_features` numbers; of a classifier those before its head.

        Raises:
            ImageError: bytes that are no image, or too many pixels; says the position.
        """
        return self.features(self.decode(images))

    def reconstruct(self, images: Sequence[bytes]) -> list[dict[str, str]]:
        """What the method draws of each image, as base64 PNG: of MAE `original`, `masked`, `reconstruction`.

        The same bytes give the same masks.

        Raises:
            ValueError: the artifact holds no state of a method that draws.
            ImageError: bytes that are no image, or too many pixels; says the position.
        """
        if not self.card.reconstructs:
            raise ValueError(
                f"got a {self.card.kind} of method {self.card.spec.method.name!r}, expected one whose method draws "
                "reconstructions; use :reconstruct on a pretrained encoder, of mae for instance"
            )
        method = self._method
        keys = torch.tensor([_key(data) for data in images], dtype=torch.int64)
        drawn: list[dict[str, str]] = []
        with torch.inference_mode():
            for i, pixels in enumerate(self._chunks(self.decode(images))):
                pictures = method.pictures({"image": pixels, "key": keys[i * CHUNK : (i + 1) * CHUNK]})
                for row in pngs(pictures, self._view):
                    drawn.append({kind: base64.b64encode(data).decode() for kind, data in row.items()})
        return drawn

    def expect_classifier(self) -> None:
        """Raises ValueError where the artifact is an encoder: it has no classes to predict."""
        if self.card.kind != "classifier":
            raise ValueError("got an encoder, expected a classifier; use :embed or fine-tune it")

    def decode(self, images: Sequence[bytes]) -> list[Tensor]:
        """uint8 [3, H, W] of each image, of the size of the artifact.

        Raises:
            ImageError: bytes that are no image, or too many pixels; says the position.
        """
        pixels = []
        for position, data in enumerate(images):  # one at a time: none but one is in memory in its own size
            try:
                image = decode(data, max_pixels=self._max_pixels)
            except ImageError as error:
                raise ImageError(f"image {position}: {error}") from error
            pixels.append(execute(self._view, [image])[0][0])
        return pixels

    def classify(self, pixels: Sequence[Tensor]) -> list[dict[str, Any]]:
        """`predict` of decoded images."""
        classes = self.card.classes
        answers: list[dict[str, Any]] = []
        with torch.inference_mode():
            for images in self._chunks(pixels):
                top = self._network(images).float().softmax(dim=1).topk(min(TOP, len(classes)))
                for values, indices in zip(top.values.tolist(), top.indices.tolist(), strict=True):
                    probabilities = {classes[index]: value for index, value in zip(indices, values, strict=True)}
                    answers.append({"label": classes[indices[0]], "index": indices[0], "probabilities": probabilities})
        return answers

    def features(self, pixels: Sequence[Tensor]) -> list[list[float]]:
        """`embed` of decoded images."""
        answers: list[list[float]] = []
        with torch.inference_mode():
            for images in self._chunks(pixels):
                answers += self._pooled(images).float().tolist()
        return answers

    def warm_up(self) -> None:
        """One forward: the first one of a process is slow, and a broken device shows here."""
        self.features([torch.zeros(3, *height_width(self.card.image_size), dtype=torch.uint8)])

    def _pooled(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] -> [B, num_features]."""
        network: Any = self._network
        if self.card.kind == "encoder":
            return network(images)
        return network.forward_head(network.forward_features(images), pre_logits=True)

    @cached_property
    def _method(self) -> Method:
        from workloads.assemble import restore_method  # pyarrow, which only this needs

        return restore_method(self._folder, self._home)

    def _chunks(self, pixels: Sequence[Tensor]) -> Iterable[Tensor]:
        """uint8 [3, H, W] each -> normalised [at most CHUNK, 3, H, W]."""
        for start in range(0, len(pixels), CHUNK):
            yield normalise(torch.stack(tuple(pixels[start : start + CHUNK])), self._view)


def pngs(pictures: dict[str, Tensor], view: View) -> list[dict[str, bytes]]:
    """What a method draws, each kind normalised [B, 3, H, W], as PNG: of each image, by kind."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (view.mean, view.std))

    def column(drawn: Tensor) -> list[bytes]:
        pixels = ((drawn.float() * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        return [_png(image) for image in pixels.permute(0, 2, 3, 1).contiguous().numpy()]

    columns = [column(drawn) for drawn in pictures.values()]
    return [dict(zip(pictures, row, strict=True)) for row in zip(*columns, strict=True)]


def _png(pixels: NDArray[np.uint8]) -> bytes:
    """uint8 [H, W, 3] -> a file."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="PNG")
    return file.getvalue()


def _key(data: bytes) -> int:
    """The int64 key of an image: a function of its bytes alone."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big", signed=True)
