"""Executes views of volumes: crop, resampling, flips and light jitter; labels follow the same geometry.

Nothing is rotated, so each axis is resampled apart. A sample is worked on alone: what it becomes does not depend on
its batch, and a batch takes the memory of one volume and its crops.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from workloads.data.keys import uniform
from workloads.data.records import MediaError
from workloads.data.volume import Volume, decode_labels, decode_volume

STATISTICS_VOXELS = 1_000_000  # of a larger volume every n-th voxel is looked at: percentiles sort


class Jitter(BaseModel):
    """With probability `p` a factor of [low, high], below and above 1 equally often; else 1."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    low: float = Field(gt=0, le=1)
    high: float = Field(ge=1)
    p: float = Field(ge=0, le=1)


# nnU-Net's training augmentation (Isensee et al. 2021, supplementary note 4), without rotation, noise, blur and low
# resolution: `VolumeView(size=..., crop="random", flip=(0.5, 0.5, 0.5), **NNUNET)`.
NNUNET = {
    "zoom": Jitter(low=0.7, high=1.4, p=0.2),
    "brightness": Jitter(low=0.75, high=1.25, p=0.15),
    "contrast": Jitter(low=0.75, high=1.25, p=0.15),
    "gamma": Jitter(low=0.7, high=1.5, p=0.3),
}


class VolumeView(BaseModel):
    """A box of a volume. All triples are along D, H, W.

    Attributes:
        member: suffix of the shard member that holds the volume.
        size: of the result in voxels; what the volume does not cover is 0, that is the mean or the lower bound.
        crop: where the box lies; along an axis on which the volume is smaller, it is in the middle of the box.
        spacing_mm: distance of the result's voxels; None, of all axes or of one, keeps that of the file.
        clip_percentiles: values outside are clipped, by volume and channel: (0.5, 99.5) is nnU-Net's for CT.
        window: values outside are clipped: (-175, 250) Hounsfield units shows soft tissue.
        normalise: to mean 0 and deviation 1 of the clipped volume, by channel; or from the bounds to [0, 1].
        flip: probability of mirroring each axis.
        zoom: magnifies the content.
        brightness: multiplies the normalised values.
        contrast: multiplies their distance from the crop's mean; they stay within the crop's range.
        gamma: exponent of values scaled to [0, 1] within the crop; mean and deviation are kept.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "nii.gz"
    size: tuple[int, int, int]
    crop: Literal["random", "center"] = "center"
    spacing_mm: tuple[float | None, float | None, float | None] | None = None
    clip_percentiles: tuple[float, float] | None = None
    window: tuple[float, float] | None = None
    normalise: Literal["zscore", "minmax"] = "zscore"
    flip: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zoom: Jitter | None = None
    brightness: Jitter | None = None
    contrast: Jitter | None = None
    gamma: Jitter | None = None

    @property
    def draws(self) -> bool:
        """Whether anything about it is random."""
        jitters = (self.zoom, self.brightness, self.contrast, self.gamma)
        return self.crop == "random" or max(self.flip) > 0 or any(jitters)

    @model_validator(mode="after")
    def _in_range(self) -> VolumeView:
        if min(self.size) < 1:
            raise ValueError(f"got size={self.size}, expected at least 1 voxel on each axis")
        if any(step is not None and not 0 < step < math.inf for step in self.spacing_mm or ()):
            raise ValueError(f"got spacing_mm={self.spacing_mm}, expected positive numbers")
        if not 0 <= min(self.flip) <= max(self.flip) <= 1:
            raise ValueError(f"got flip={self.flip}, expected probabilities of D, H and W")
        if self.window is not None and self.clip_percentiles is not None:
            raise ValueError("got window and clip_percentiles, expected one of them; both clip the values")
        if self.window is not None and not self.window[0] < self.window[1]:
            raise ValueError(f"got window={self.window}, expected low < high")
        if self.clip_percentiles is not None and not 0 <= self.clip_percentiles[0] < self.clip_percentiles[1] <= 100:
            raise ValueError(f"got clip_percentiles={self.clip_percentiles}, expected 0 <= low < high <= 100")
        return self


class LabelsView(BaseModel):
    """The class of each voxel of a volume's view; `fill` is the class of what the volume does not cover."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "seg.nii.gz"
    follows: str = "volume"
    fill: int = 255


@dataclass(frozen=True)
class VolumeGeometry:
    """Where each sample's box lies in its volume; what is cut out is then flipped. All along D, H, W.

    Attributes:
        size: int64 [B, 3], of the volume in voxels.
        corner: float64 [B, 3], of the box in voxels of the volume; negative where the box begins outside.
        extent: float64 [B, 3], of the box in voxels of the volume.
        flip: bool [B, 3].
        spacing_mm: float64 [B, 3], distance of the result's voxels; a zoom shows in `extent`, not here.
    """

    size: Tensor
    corner: Tensor
    extent: Tensor
    flip: Tensor
    spacing_mm: Tensor

    def packed(self) -> Tensor:
        """As one float64 [B, 5, 3], which travels in a batch: the fields in their order."""
        return torch.stack([getattr(self, field.name).double() for field in fields(self)], dim=1)

    @classmethod
    def unpacked(cls, packed: Tensor) -> VolumeGeometry:
        """The inverse of `packed`."""
        size, corner, extent, flip, spacing_mm = packed.unbind(1)
        return cls(size.long(), corner, extent, flip > 0, spacing_mm)

    def covered(self, shape: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Which part of a box of so many voxels the volume covers: the first voxel and how many, int64 [B, 3] each."""
        n = torch.tensor(shape, device=self.corner.device)
        step = self.extent / n
        first, after = (
            ((edge - self.corner) / step - 0.5).ceil().clamp(min=0).minimum(n).long() for edge in (0, self.size)
        )
        return torch.where(self.flip, n - after, first), after - first


def execute(
    view: VolumeView, data: Sequence[bytes], keys: Tensor | None = None, salt: str = ""
) -> tuple[Tensor, VolumeGeometry]:
    """Looks at each encoded volume through the view.

    Args:
        view: what to look at.
        data: B encoded volumes, B >= 1.
        keys: int64 [B], the randomness of each sample; not needed where the view draws nothing.
        salt: makes two views of one sample independent.

    Returns:
        float32 [B, C, *size] and the geometry.

    Raises:
        MediaError: a volume cannot be decoded, or has another number of channels than the first.
    """
    assert data, "an empty batch has no channels"
    if keys is None:
        assert not view.draws, "a view that draws needs keys"
        keys = torch.zeros(len(data), dtype=torch.int64)
    boxes, drawn = [], []
    for member, key in zip(data, keys.split(1), strict=True):
        volume = decode_volume(member)
        size = torch.tensor([volume.voxels.shape[1:]], dtype=torch.int64)
        geometry = draw(view, size, torch.tensor([volume.spacing_mm], dtype=torch.float64), key, salt)
        boxes.append(_jitter(view, _render(view, volume, geometry), key, salt))
        drawn.append(geometry)
        if len(boxes[-1]) != len(boxes[0]):
            raise MediaError(f"got volumes of {len(boxes[0])} and {len(boxes[-1])} channels, expected as many in each")
    columns = (torch.cat([getattr(row, field.name) for row in drawn]) for field in fields(VolumeGeometry))
    return torch.stack(boxes), VolumeGeometry(*columns)


def draw(view: VolumeView, size: Tensor, spacing_mm: Tensor, keys: Tensor, salt: str = "") -> VolumeGeometry:
    """Draws the box of each sample.

    Args:
        view: what to draw for.
        size: int64 [B, 3], of the volumes in voxels.
        spacing_mm: float64 [B, 3], of the volumes.
        keys: int64 [B].
        salt: see `execute`.
    """
    u = uniform(keys, 8, salt)
    wanted_mm = spacing_mm
    if view.spacing_mm is not None:
        kept = torch.tensor([step is None for step in view.spacing_mm])
        given_mm = torch.tensor([step or 0.0 for step in view.spacing_mm], dtype=torch.float64)
        wanted_mm = torch.where(kept, spacing_mm, given_mm)
    zoom = _factor(view.zoom, u[:, 6:7], u[:, 7:8])
    extent = torch.tensor(view.size) * wanted_mm / spacing_mm / zoom
    room = size - extent
    place = torch.where(room == room.floor(), (room / 2).floor(), room / 2)  # whole voxels are not resampled
    if view.crop == "random":
        place = torch.where(room > 0, (u[:, :3] * (room.floor() + 1)).floor(), place)
    return VolumeGeometry(size, place, extent, u[:, 3:6] < torch.tensor(view.flip), wanted_mm)


def _factor(jitter: Jitter | None, u: Tensor, v: Tensor) -> Tensor:
    if jitter is None:
        return torch.ones_like(u)
    below, above = jitter.low + (1 - jitter.low) * 2 * v, 1 + (jitter.high - 1) * (2 * v - 1)
    return torch.where(u < jitter.p, torch.where(v < 0.5, below, above), 1.0)


def _positions(geometry: VolumeGeometry, shape: Sequence[int]) -> list[Tensor]:
    """Where the voxels of the first sample's box lie in the volume, by axis: float64 [D], [H], [W]; i spans i..i+1."""
    axes = []
    rows = zip(shape, geometry.corner[0], geometry.extent[0], geometry.flip[0], strict=True)
    for n, corner, extent, flip in rows:
        position = corner + (torch.arange(n).double() + 0.5) * (extent / n)
        axes.append(position.flip(0) if flip else position)
    return axes


def _render(view: VolumeView, volume: Volume, geometry: VolumeGeometry) -> Tensor:
    """Trilinear resampling, then clipping and normalisation by the whole volume -> float32 [C, *size]."""
    low, high, shift, scale = (torch.tensor(column)[:, None, None, None] for column in _statistics(view, volume))
    box = torch.from_numpy(volume.voxels)
    covered = torch.ones(1, 1, 1)
    for axis, position in enumerate(_positions(geometry, view.size)):
        n = box.shape[axis + 1]
        shape = [-1 if i == axis else 1 for i in range(3)]
        covered = covered * ((position >= 0) & (position < n)).float().reshape(shape)
        position = (position - 0.5).clamp(0, n - 1)
        first = position.floor().long()
        weight = (position - first).float().reshape(shape)
        near = box.index_select(axis + 1, first)
        box = near.lerp(box.index_select(axis + 1, (first + 1).clamp(max=n - 1)), weight) if weight.any() else near
    return box.clamp(low, high).sub_(shift).div_(scale).mul_(covered)


def _statistics(view: VolumeView, volume: Volume) -> np.ndarray[tuple[int, int], np.dtype[np.float32]]:
    """[4, C]: bounds to clip at, what to subtract, what to divide by."""
    rows = []
    for channel in volume.voxels:
        values = channel.reshape(-1)[:: -(-channel.size // STATISTICS_VOXELS)].astype(np.float64)
        low, high = view.window or np.percentile(values, view.clip_percentiles or (0, 100))
        values = values.clip(low, high)
        shift, scale = (values.mean(), values.std()) if view.normalise == "zscore" else (low, high - low)
        bounded = view.window or view.clip_percentiles
        rows.append([low if bounded else -np.inf, high if bounded else np.inf, shift, scale or 1.0])
    return np.array(rows, dtype=np.float32).T


def _jitter(view: VolumeView, box: Tensor, key: Tensor, salt: str) -> Tensor:
    """Brightness, contrast, gamma of one sample, in nnU-Net's order: float32 [C, D, H, W], int64 [1]."""
    u = uniform(key, 6, f"{salt}/intensity")
    jitters = (view.brightness, view.contrast, view.gamma)
    factors = (_factor(jitter, u[:, i], u[:, i + 1]).item() for jitter, i in zip(jitters, (0, 2, 4), strict=True))
    brightness, contrast, gamma = factors
    box = box * brightness if brightness != 1 else box
    axes = (1, 2, 3)
    if contrast != 1:
        mean = box.mean(axes, keepdim=True)
        box = ((box - mean) * contrast + mean).clamp(box.amin(axes, keepdim=True), box.amax(axes, keepdim=True))
    if gamma != 1:
        low, high = box.amin(axes, keepdim=True), box.amax(axes, keepdim=True)
        bent = ((box - low) / (high - low).clamp(min=1e-7)) ** gamma
        scale = box.std(axes, keepdim=True, correction=0) / bent.std(axes, keepdim=True, correction=0).clamp(min=1e-7)
        box = (bent - bent.mean(axes, keepdim=True)) * scale + box.mean(axes, keepdim=True)
    return box


def execute_labels(
    view: LabelsView, data: Sequence[bytes], geometry: VolumeGeometry, size: tuple[int, int, int]
) -> Tensor:
    """Looks at encoded class volumes through the geometry of another view (nearest voxel).

    Args:
        view: what to fill with.
        data: B encoded volumes of class numbers.
        geometry: of the view that is followed.
        size: of that view's result.

    Returns:
        int64 [B, *size].

    Raises:
        MediaError: labels cannot be decoded, or are not of their volume's size.
    """
    result = torch.empty(len(data), *size, dtype=torch.int64)
    for i, member in enumerate(data):
        row = VolumeGeometry(*(getattr(geometry, field.name)[i : i + 1] for field in fields(VolumeGeometry)))
        labels = torch.from_numpy(decode_labels(member))
        if tuple(labels.shape) != tuple(row.size[0].tolist()):
            raise MediaError(
                f"got labels of {tuple(labels.shape)} for a volume of {tuple(row.size[0].tolist())} voxels"
            )
        for axis, position in enumerate(_positions(row, size)):
            n = labels.shape[axis]
            labels = labels.index_select(axis, position.floor().long().clamp(0, n - 1))
            outside = ((position < 0) | (position >= n)).nonzero()[:, 0]
            labels = labels.index_fill(axis, outside, view.fill)
        result[i] = labels
    return result
