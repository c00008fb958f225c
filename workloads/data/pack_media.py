"""Videos and volumes that are packed: bytes as they are, each decoded once to be sure that it can be."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

from workloads.data.member_checks import check_of
from workloads.data.pack import SAMPLES_PER_SHARD
from workloads.data.pack_files import checked, class_member, file_source, find_files, stem_and_suffix, write_found
from workloads.data.shard_writer import Members, OnSample, Packed, SampleError, Source, nobody
from workloads.data.tarscan import VIDEO_SUFFIXES

VOLUME_SUFFIXES = ("nii.gz", "npy")


def pack_videos(
    root: Path,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """A folder of videos (mp4, avi, mov, mkv, webm), as `pack_folder`; the first frame of each must decode.

    Raises:
        DataError: PyAV is not installed, no video, or an `out` that may not be replaced.
    """
    check = check_of("video")
    assert check is not None
    found = find_files(root, VIDEO_SUFFIXES)

    def source(path: Path, label: int | None) -> Source:
        return file_source(path, root, VIDEO_SUFFIXES, checked(check, class_member(label)))

    return write_found(
        "pack videos",
        root,
        found,
        source,
        out,
        samples_per_shard=samples_per_shard,
        force=force,
        on_sample=on_sample,
    )


def pack_volumes(
    root: Path,
    out: Path,
    *,
    samples_per_shard: int = SAMPLES_PER_SHARD,
    force: bool = False,
    on_sample: OnSample = nobody,
) -> Packed:
    """A folder of volumes (nii.gz, npy), each with its mask where there is one.

    The mask of `KEY.nii.gz` is `KEY.seg.nii.gz` beside it, or `KEY.nii.gz` in a folder `labels` in its folder or beside
    it (for `imagesTr` that is `labelsTr`). Folders `images...` and `labels...` are no classes, others are, as in
    `pack_folder`.

    Raises:
        DataError: nibabel is not installed, no volume, or an `out` that may not be replaced.
    """
    check_of("nii.gz")  # its library is there
    found = find_files(root, VOLUME_SUFFIXES, lambda name: bool(re.match("images|labels", name)))

    def source(path: Path, label: int | None) -> Source | None:
        if _is_mask(path):
            return None
        beside = partial(_with_mask, find_mask(path), class_member(label))
        return file_source(path, root, VOLUME_SUFFIXES, beside)

    return write_found(
        "pack volumes",
        root,
        found,
        source,
        out,
        samples_per_shard=samples_per_shard,
        force=force,
        on_sample=on_sample,
    )


def find_mask(path: Path) -> Path | None:
    """The mask of a volume, where there is one."""
    stem, suffix = stem_and_suffix(path, VOLUME_SUFFIXES)
    folder = path.parent
    places = [folder / "labels"]
    if folder.name.startswith("images"):
        places.append(folder.with_name(folder.name.replace("images", "labels", 1)))
    candidates = [folder / f"{stem}.seg.{other}" for other in (suffix, *VOLUME_SUFFIXES)]
    candidates += [place / f"{stem}.{other}" for place in places for other in (suffix, *VOLUME_SUFFIXES)]
    return next((candidate for candidate in candidates if candidate.is_file()), None)


def _is_mask(path: Path) -> bool:
    stem, _ = stem_and_suffix(path, VOLUME_SUFFIXES)
    return stem.endswith(".seg") or path.parent.name.startswith("labels")


def _with_mask(mask: Path | None, others: Members, data: bytes) -> Members:
    """Checks a volume and its mask; the members beside the volume."""
    from workloads.data.volume import decode_labels, decode_volume

    expected = decode_volume(data).voxels.shape[1:]
    if mask is None:
        return others
    labels = mask.read_bytes()
    if (got := decode_labels(labels).shape) != expected:
        raise SampleError(f"got a mask {mask.name} of {got} voxels, expected {expected} as its volume")
    return {f"seg.{stem_and_suffix(mask, VOLUME_SUFFIXES)[1]}": labels, **others}
