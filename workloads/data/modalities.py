"""One sample through the views of a method, whatever its modality, and samples into a batch.

Images, masks, boxes, arrays and captions are decoded one by one and looked at by batch; videos and volumes, whose
decoding depends on what is drawn, are looked at one by one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from workloads.data.decode import ImageError, decode
from workloads.data.records import array, boxes, captions, mask
from workloads.data.shards import DataError
from workloads.data.transforms import image, targets
from workloads.data.transforms.targets import BoxesView, MaskView
from workloads.data.views import View

if TYPE_CHECKING:
    from workloads.data.transforms.video import ClipView
    from workloads.data.transforms.volume import LabelsView, VolumeView


class ArrayView(BaseModel):
    """An array as it is stored; all of a batch must have one shape."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "npy"


class CaptionsView(BaseModel):
    """The lines of a text, as a list of strings for each sample."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    member: str = "txt"


AnyView: TypeAlias = "View | MaskView | BoxesView | ClipView | VolumeView | LabelsView | ArrayView | CaptionsView"
Views: TypeAlias = Mapping[str, AnyView]
Loaded: TypeAlias = dict[str, Any]  # what one view, or several of one member, see of one sample


def check(views: Views) -> None:
    """Refuses views of which one cannot follow another.

    Raises:
        DataError: what is followed comes later or is of another modality, or its shape is changed after the geometry.
    """
    before: dict[str, AnyView] = {}
    for name, view in views.items():
        if hasattr(view, "follows"):
            followed = before.get(view.follows)
            image = isinstance(view, MaskView | BoxesView)
            if followed is None or isinstance(followed, View) != image or not hasattr(followed, "size"):
                wanted = "an image" if image else "a volume"
                raise DataError(f"got {name} that follows {view.follows}, expected {wanted} view named before it")
            if isinstance(followed, View) and followed.randaugment:
                raise DataError(
                    f"got {name} that follows {view.follows}, whose randaugment moves pixels about; leave it out there"
                )
        before[name] = view


def load(views: Views, files: Mapping[str, Sequence[bytes]], keys: Tensor, i: int) -> Loaded:
    """Decodes one sample.

    Args:
        views: by name; one that follows another comes after it.
        files: the encoded members of some samples; empty where one has none.
        keys: int64 [b], the randomness of these samples.
        i: which of them.

    Raises:
        ImageError: a member is missing or cannot be decoded.
    """
    loaded: Loaded = {}
    for name, view in views.items():
        data = files[view.member][i]
        if not data:
            raise ImageError(f"got no {view.member}, expected one in each sample")
        match view:
            case View():
                if view.member not in loaded:
                    loaded[view.member] = decode(data)
            case MaskView():
                loaded[name] = mask(data)
            case BoxesView():
                loaded[name] = boxes(data)
            case ArrayView():
                loaded[name] = array(data)
            case CaptionsView():
                loaded[name] = captions(data)
            case _:
                loaded[name] = _load_media(view, views, loaded, data, keys[i : i + 1], name)
    return loaded


def _load_media(
    view: ClipView | VolumeView | LabelsView, views: Views, loaded: Loaded, data: bytes, key: Tensor, name: str
) -> Any:
    from workloads.data.transforms import video, volume  # PyAV and nibabel cost what they cost only where used

    match view:
        case video.ClipView():
            return video.execute(view, [data], key, name)
        case volume.VolumeView():
            return volume.execute(view, [data], key, name)
    followed = views[view.follows]
    assert isinstance(followed, volume.VolumeView), f"{name} follows {view.follows}, which is no volume"
    return volume.execute_labels(view, [data], loaded[view.follows][1], followed.size)


def collate(views: Views, samples: Sequence[Loaded], keys: Tensor) -> dict[str, Any]:
    """Loaded samples -> what the views see of the batch.

    Args:
        views: as in `load`.
        samples: B of them.
        keys: int64 [B].

    Returns:
        by the name of each view: of a View uint8 [B, 3, H, W], and as NAME_geometry its packed geometry; of a
        MaskView int64 [B, H, W]; of a BoxesView float32 [B, most, 4], and as NAME_label int64 [B, most]; of a ClipView
        uint8 [B, 3, T, S, S], and as NAME_time_s float64 [B, T]; of a VolumeView float32 [B, C, D, H, W], and as
        NAME_geometry its packed geometry; of a LabelsView int64 [B, D, H, W]; of an ArrayView [B, ...]; of a
        CaptionsView a list of B lists of lines.
        Arrays, clips and volumes, whose shape the samples say, are left out without any: a rank may have no share of
        the short last batch of an epoch.

    Raises:
        ImageError: arrays of several shapes.
    """
    batch: dict[str, Any] = {}
    geometries: dict[str, image.Geometry] = {}
    for name, view in views.items():
        match view:
            case View():
                pixels = [sample[view.member] for sample in samples]
                batch[name], geometries[name] = image.execute(view, pixels, keys, salt=name)
                batch[f"{name}_geometry"] = geometries[name].packed()
            case MaskView() | BoxesView():
                geometry, size = geometries[view.follows], tuple(batch[view.follows].shape[-2:])
                decoded = [sample[name] for sample in samples]
                if isinstance(view, MaskView):
                    batch[name] = targets.render_masks(view, decoded, geometry, size)
                else:
                    batch[name], batch[f"{name}_label"] = targets.render_boxes(view, decoded, geometry, size)
            case ArrayView() if samples:
                batch[name] = _stacked(name, [sample[name] for sample in samples])
            case CaptionsView():
                batch[name] = [sample[name] for sample in samples]
            case _ if samples:
                batch |= _collate_media(name, [sample[name] for sample in samples])
    return batch


def _collate_media(name: str, looked: list[Any]) -> dict[str, Tensor]:
    if isinstance(looked[0], Tensor):
        return {name: torch.cat(looked)}
    batch = {name: torch.cat([pixels for pixels, _ in looked])}
    geometries = [geometry for _, geometry in looked]
    if hasattr(geometries[0], "times_s"):
        return batch | {f"{name}_time_s": torch.cat([geometry.times_s for geometry in geometries])}
    return batch | {f"{name}_geometry": torch.cat([geometry.packed() for geometry in geometries])}


def _stacked(name: str, arrays: list[Any]) -> Tensor:
    shapes = sorted({each.shape for each in arrays})
    if len(shapes) > 1:
        raise ImageError(f"got {name} of shapes {shapes[0]} and {shapes[1]} in one batch, expected one shape; pad them")
    return torch.from_numpy(np.stack(arrays))
