"""Executes views of videos: which frames, then one crop and flip for all frames of a clip.

Memory holds a clip's frames, [B, T, 3, S, S], seen as [B, 3, T, S, S]. What works on batches of images, such as
photometry, takes `clips.transpose(1, 2).flatten(0, 1)` (no copy) with `keys.repeat_interleave(T)`: frames that share
a key get the same draw, so a colour jitter is the same in all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor

from workloads.data.keys import uniform
from workloads.data.transforms import image
from workloads.data.transforms.image import Geometry
from workloads.data.video import Video, VideoInfo
from workloads.data.views import IMAGENET_MEAN, IMAGENET_STD, View


class ClipView(BaseModel):
    """One square clip of a video.

    Attributes:
        member: suffix of the shard member that holds the video.
        frames: T, of the clip.
        sampling: "stride": every `stride`-th frame of a stretch of the video (SlowFast, Feichtenhofer et al. 2019).
            "seconds": frames spread evenly over `seconds` of time, whatever the frame rate.
            "segments": one frame of each of T equal parts of the whole video (TSN, Wang et al. 2016, section 3.1).
            Where the video is too short, its last frame is repeated; in "segments", every frame may be.
        random_time: draws where the stretch begins, or which frame of a segment is taken; else the middle.
        stride: frames from one to the next.
        seconds: length of the stretch.
        size, crop_scale, crop_ratio, flip, interpolation, mean, std: as of `View`, the same for all frames.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "video"
    frames: int = Field(ge=1, le=1024)
    sampling: Literal["stride", "seconds", "segments"] = "stride"
    random_time: bool = True
    stride: int = Field(default=1, ge=1)
    seconds: float | None = Field(default=None, gt=0)
    size: int = Field(ge=1)
    crop_scale: tuple[float, float] = (1.0, 1.0)
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = Field(default=0.0, ge=0, le=1)
    interpolation: Literal["bilinear", "bicubic"] = "bilinear"
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    @property
    def frame(self) -> View:
        """What is looked at in each frame."""
        shared = {"size", "crop_scale", "crop_ratio", "flip", "interpolation", "mean", "std"}
        return View(**self.model_dump(include=shared))

    @property
    def draws(self) -> bool:
        """Whether anything about it is random."""
        return self.random_time or self.frame.draws

    @model_validator(mode="after")
    def _in_range(self) -> ClipView:
        if (self.seconds is not None) != (self.sampling == "seconds"):
            got = f"sampling={self.sampling!r} and seconds={self.seconds}"
            raise ValueError(f"got {got}, expected a number of seconds where sampling='seconds', and only there")
        if self.stride != 1 and self.sampling != "stride":
            raise ValueError(f"got stride={self.stride} and sampling={self.sampling!r}, expected sampling='stride'")
        _ = self.frame  # a View checks its own limits
        return self


@dataclass(frozen=True)
class ClipGeometry:
    """Where each sample's clip lies in its video.

    Attributes:
        frame: the cut, which is the same in all frames.
        indices: int64 [B, T], numbers of the frames, in the order in which they are shown.
        times_s: float64 [B, T], when they are shown.
    """

    frame: Geometry
    indices: Tensor
    times_s: Tensor


def execute(
    view: ClipView, data: Sequence[bytes], keys: Tensor | None = None, salt: str = ""
) -> tuple[Tensor, ClipGeometry]:
    """Looks at each encoded video through the view; frames that the clip does not show are decoded only where needed.

    Args:
        view: what to look at.
        data: B encoded videos.
        keys: int64 [B], the randomness of each sample; not needed where the view draws nothing.
        salt: makes two views of one sample independent.

    Returns:
        uint8 [B, 3, T, size, size] and the geometry.

    Raises:
        MediaError: a video cannot be decoded.
    """
    if keys is None:
        assert not view.draws, "a view that draws needs keys"
        keys = torch.zeros(len(data), dtype=torch.int64)
    T, S = view.frames, view.size
    clips = torch.empty(len(data), T, 3, S, S, dtype=torch.uint8)
    indices, times_s = torch.empty(len(data), T, dtype=torch.int64), torch.empty(len(data), T, dtype=torch.float64)
    size = torch.empty(len(data), 2, dtype=torch.int64)
    look = view.frame
    for i, (member, key) in enumerate(zip(data, keys.split(1), strict=True)):
        with Video(member) as video:
            info = video.info
            indices[i] = sample(view, info, key, salt)
            times_s[i] = torch.from_numpy(info.times_s)[indices[i]]
            size[i] = torch.tensor([info.width, info.height])
            pixels = list(video.frames(indices[i].tolist()))
        cut = image.draw(look, size[i : i + 1].expand(T, 2), key.expand(T), salt)
        clips[i] = image.render(look, pixels, cut)
    return clips.transpose(1, 2), ClipGeometry(image.draw(look, size, keys, salt), indices, times_s)


def sample(view: ClipView, info: VideoInfo, key: Tensor, salt: str = "") -> Tensor:
    """Draws the frames of one clip.

    Args:
        view: how to sample.
        info: of the video.
        key: int64 [1], of the sample.
        salt: see `execute`.

    Returns:
        int64 [T], never falling.
    """
    T, N = view.frames, info.frames
    u = uniform(key, T, f"{salt}/time")[0] if view.random_time else torch.full((T,), 0.5, dtype=torch.float64)
    steps = torch.arange(T)
    if view.sampling == "segments":
        indices = ((steps + u) * (N / T)).long()
    elif view.sampling == "stride":
        places = max(N - (T - 1) * view.stride, 1)  # where it can begin
        indices = int(u[0] * places) + steps * view.stride
    else:
        assert view.seconds is not None
        begin = u[0] * max(info.duration_s - view.seconds, 0)
        wanted = begin + (steps + 0.5) * (view.seconds / T)
        indices = torch.searchsorted(torch.from_numpy(info.times_s), wanted, right=True) - 1  # the one on show then
    return indices.clamp(0, N - 1)
