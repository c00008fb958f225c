"""Encoded volumes -> voxels and their spacing, or a MediaError: NIfTI (`.nii`, `.nii.gz`) and `.npy`.

The header is read first, and no more is decompressed than it promises: a bomb costs nothing.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import nibabel
import numpy as np
from numpy.typing import NDArray

from workloads.data.records import MediaError, array

MAX_VOXELS = 1 << 28  # 1 GiB of float32
GZIP, NPY = b"\x1f\x8b", b"\x93NUMPY"
HEADER_BYTES = 540  # of NIfTI-2; NIfTI-1 has 348
MAX_EXTENSION_BYTES = 1 << 24  # between header and voxels: what scanners and tools note down
MAX_TAIL_BYTES = 1 << 12  # behind the voxels
MM = {"mm": 1.0, "unknown": 1.0, "meter": 1000.0, "micron": 0.001}


@dataclass(frozen=True)
class Volume:
    """A decoded volume.

    Attributes:
        voxels: float32 [C, D, H, W]; of a NIfTI file D, H, W are its z, y, x, in the orientation that is stored.
        spacing_mm: distance of two voxels along D, H, W in millimetres; 1 for `.npy`.
    """

    voxels: NDArray[np.float32]
    spacing_mm: tuple[float, float, float]


def decode_volume(data: bytes, *, max_voxels: int = MAX_VOXELS) -> Volume:
    """Decodes a volume of three axes, or of four: the channels are NIfTI's last axis and the first of an `.npy` file.

    Slope and intercept of NIfTI are applied.

    Args:
        data: the encoded volume.
        max_voxels: more are refused by the header, before any memory is taken.

    Raises:
        MediaError: another format, a damaged file, voxels that are no finite real numbers, or too many.
    """
    if data[:6] == NPY:
        voxels, spacing_mm = array(data), (1.0, 1.0, 1.0)
        _expect_voxels(voxels.shape, voxels.dtype, max_voxels)
        voxels = voxels if voxels.ndim == 4 else voxels[None]
    else:
        voxels, spacing_mm = _nifti(data, max_voxels)
    with np.errstate(all="ignore"):  # what overflows is found below
        voxels = np.ascontiguousarray(voxels, dtype=np.float32)
    # The sum is finite unless a voxel is not: float64 holds 2**28 of the largest float32.
    if not np.isfinite(voxels.sum(dtype=np.float64)):
        raise MediaError("got voxels that are infinite or not a number, expected finite ones; replace them, by 0 say")
    return Volume(voxels, spacing_mm)


def decode_labels(data: bytes, *, max_voxels: int = MAX_VOXELS) -> NDArray[np.int32]:
    """Decodes the class number of each voxel: int32 [D, H, W].

    Raises:
        MediaError: see `decode_volume`; also more than one channel, or fractions.
    """
    voxels = decode_volume(data, max_voxels=max_voxels).voxels
    labels = voxels[0].astype(np.int32) if np.abs(voxels).max() < 2**24 else None  # beyond, float32 has gaps
    if len(voxels) != 1 or labels is None or not np.array_equal(labels, voxels[0]):
        raise MediaError(f"got labels of {len(voxels)} channels with fractions or huge numbers, expected class numbers")
    return labels


def _expect_voxels(shape: tuple[int, ...], dtype: np.dtype[Any], max_voxels: int) -> None:
    if len(shape) not in (3, 4) or min(shape) < 1 or dtype.kind not in "biuf":
        raise MediaError(f"got an array of shape {shape} and {dtype}, expected a volume of 3 or 4 axes, real numbers")
    if math.prod(shape) > max_voxels:
        raise MediaError(f"got a volume of shape {shape}, expected at most {max_voxels} voxels; cut or resample it")


def _nifti(data: bytes, max_voxels: int) -> tuple[NDArray[Any], tuple[float, float, float]]:
    """[C, z, y, x] and the spacing along z, y, x."""
    start = _inflate(data, HEADER_BYTES)
    kinds: tuple[Any, ...] = (nibabel.Nifti1Image, nibabel.Nifti2Image)
    kind = next((kind for kind in kinds if kind.header_class.may_contain_header(start)), None)
    if kind is None:
        raise MediaError(f"got {len(data)} bytes that start with {bytes(data[:8])!r}, expected .nii, .nii.gz or .npy")
    try:
        header = kind.header_class(start[: kind.header_class.template_dtype.itemsize], check=False)
        full_shape, dtype = tuple(int(n) for n in header.get_data_shape()), header.get_data_dtype()
        shape = full_shape[:3] + tuple(n for n in full_shape[3:] if n != 1)  # (x, y, z, 1, 1) is common
        offset, unit = int(header.get_data_offset()), header.get_xyzt_units()[0]
        # Rounded: the header holds float32, in which 0.7 is not 0.7.
        spacing_mm = tuple(round(float(zoom) * MM[unit], 6) for zoom in header.get_zooms()[:3])
    except Exception as error:  # nibabel raises whatever its parser meets: HeaderDataError, KeyError, ...
        raise MediaError(f"got a NIfTI header that cannot be read ({error}), expected a whole one") from error
    _expect_voxels(shape, dtype, max_voxels)
    if not all(0 < step < math.inf for step in spacing_mm):
        raise MediaError(f"got voxels {spacing_mm} mm apart, expected positive numbers; correct pixdim in the header")
    if not 0 <= offset <= MAX_EXTENSION_BYTES:
        raise MediaError(f"got voxels at byte {offset}, expected them below {MAX_EXTENSION_BYTES}")
    wanted = offset + math.prod(shape) * dtype.itemsize
    whole = _inflate(data, wanted + MAX_TAIL_BYTES)
    if not wanted <= len(whole) < wanted + MAX_TAIL_BYTES:
        raise MediaError(f"got {len(whole)} bytes of a volume of shape {shape} and {dtype}, expected {wanted}")
    try:
        with np.errstate(all="ignore"):
            voxels = kind.from_bytes(whole).get_fdata(dtype=np.float32, caching="unchanged")
    except Exception as error:
        raise MediaError(f"got a NIfTI file that cannot be read ({error}), expected a whole one") from error
    x, y, z = spacing_mm
    return voxels.reshape(*shape[:3], -1).T, (z, y, x)


def _inflate(data: bytes, most: int) -> bytes:
    """The first `most` bytes of what may be compressed; members that follow each other are one file, as for gzip."""
    if data[:2] != GZIP:
        return bytes(data[:most])
    parts = []
    while most > 0 and data[:2] == GZIP:
        stream = zlib.decompressobj(wbits=31)
        try:
            parts.append(stream.decompress(data, most))
        except zlib.error as error:
            raise MediaError(f"got a damaged gzip file ({error}), expected a whole one") from error
        most -= len(parts[-1])
        if most > 0 and not stream.eof:
            raise MediaError(f"got a gzip file that ends after {len(data)} bytes, expected a whole one; copy it again")
        data = stream.unused_data
    return b"".join(parts)
