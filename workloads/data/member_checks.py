"""Can the content of a member be decoded? One check by the member's name; decoders are imported when one is needed."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

from workloads.data.decode import decode
from workloads.data.shards import DataError
from workloads.data.tarscan import IMAGE_SUFFIXES

Check = Callable[[bytes], object]  # raises ImageError


def check_of(member: str) -> Check | None:
    """The check of `image`, `video`, `seg.png`, `nii.gz`, ...; None for members that are not decoded.

    Raises:
        DataError: the decoder's library is not installed.
    """
    kind = member.rsplit(".", 1)[-1]
    if member == "video":
        return _check_video()
    if member.endswith(("nii", "nii.gz")):
        return _check_volume(labels=member.startswith("seg."))
    if member == "seg.png":
        from workloads.data.records import mask

        return mask
    if kind == "npy":
        from workloads.data.records import array

        return array
    return decode if kind in ("image", *IMAGE_SUFFIXES) else None


def _check_video() -> Check:
    _expect_installed("av", "videos")
    from workloads.data.video import Video

    return lambda data: Video(data).frames([0])


def _check_volume(*, labels: bool) -> Check:
    _expect_installed("nibabel", "volumes")
    from workloads.data.volume import decode_labels, decode_volume

    return decode_labels if labels else decode_volume


def _expect_installed(module: str, media: str) -> None:
    if importlib.util.find_spec(module) is None:
        raise DataError(f"got no module {module}, expected it to open {media}; run `pip install {module}`")
