import gzip
import io
import tarfile
from functools import partial

import nibabel
import numpy as np
import pytest

from workloads.data.records import MediaError
from workloads.data.volume import decode_labels, decode_volume

RNG = np.random.default_rng(0)
VOXELS = RNG.integers(0, 200, (5, 6, 7)).astype(np.int16)  # x, y, z

compressed = partial(gzip.compress, mtime=0)  # the time would make names of tests differ between processes


def nifti(voxels=VOXELS, kind=nibabel.Nifti1Image, spacing=(1.0, 2.0, 3.0), slope=None, unit="mm"):
    image = kind(voxels, np.diag([*spacing, 1]))
    image.header.set_xyzt_units(unit)
    if slope:
        image.header.set_slope_inter(*slope)
    return image.to_bytes()


def npy(voxels):
    file = io.BytesIO()
    np.save(file, voxels)
    return file.getvalue()


@pytest.mark.parametrize("kind", [nibabel.Nifti1Image, nibabel.Nifti2Image])
@pytest.mark.parametrize("dtype", ["uint8", "int16", "float32", "float64", ">i2"])
def test_nifti_becomes_z_y_x(kind, dtype):
    data = nifti(VOXELS.astype(dtype), kind)
    for stored in (data, compressed(data)):
        volume = decode_volume(stored)
        assert volume.voxels.dtype == np.float32 and volume.voxels.flags.writeable
        assert np.array_equal(volume.voxels[0], VOXELS.transpose(2, 1, 0)) and volume.spacing_mm == (3, 2, 1)


def test_channels_slope_units_and_empty_axes():
    two = decode_volume(nifti(np.stack([VOXELS, 2 * VOXELS], axis=3)))
    assert two.voxels.shape == (2, 7, 6, 5) and np.array_equal(two.voxels[1], 2 * two.voxels[0])
    assert decode_volume(nifti(VOXELS[..., None, None])).voxels.shape == (1, 7, 6, 5)
    scaled = decode_volume(nifti(slope=(0.5, 10)))
    assert np.allclose(scaled.voxels[0], VOXELS.T * 0.5 + 10)
    assert decode_volume(nifti(unit="micron")).spacing_mm == pytest.approx((0.003, 0.002, 0.001))


def test_gzip_members_that_follow_each_other_are_one_file():
    data = nifti()
    parts = compressed(data[:400]) + compressed(data[400:])
    assert np.array_equal(decode_volume(parts).voxels[0], VOXELS.T)


def test_arrays_are_channels_first():
    assert decode_volume(npy(VOXELS)).voxels.shape == (1, 5, 6, 7)
    volume = decode_volume(npy(np.ones((2, 3, 4, 5), bool)))
    assert volume.voxels.shape == (2, 3, 4, 5) and volume.spacing_mm == (1, 1, 1) and volume.voxels.sum() == 120


def changed(place, value):
    data = bytearray(nifti())
    data[place : place + len(value)] = value
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "expected .nii"),
        (b"\x89PNG\r\n", "expected .nii"),
        (b"\x1f\x8b garbage", "damaged gzip"),
        (compressed(nifti())[:-20], "ends after"),
        (compressed(nifti())[:60], "ends after"),
        (nifti()[:-1], "expected 772"),
        (compressed(nifti() + bytes(10_000)), "expected 772"),
        (npy(np.zeros((3, 3))), "3 or 4 axes"),
        (npy(np.zeros((3, 3, 3), complex)), "real numbers"),
        (npy(np.full((2, 2, 2), np.nan)), "not a number"),
        (nifti(np.full((2, 2, 2), np.inf)), "infinite"),
        (nifti(VOXELS[:, :, 0]), "3 or 4 axes"),
        (nifti(VOXELS.astype(np.complex64)), "real numbers"),
        (changed(42, (-5).to_bytes(2, "little", signed=True)), "3 or 4 axes|header"),
        (changed(70, b"\x99\x99"), "header"),
        (changed(80, bytes(4)), "apart"),
        (changed(108, np.float32(3e9).tobytes()), "voxels at byte"),
    ],
)
def test_what_is_no_volume_is_refused(data, why):
    with pytest.raises(MediaError, match=why):
        decode_volume(data)


def test_a_flipped_bit_is_found_by_the_checksum():
    data = bytearray(compressed(nifti(RNG.integers(0, 9000, (20, 20, 20)).astype(np.int16)), 0))
    data[3000] ^= 1
    with pytest.raises(MediaError, match="damaged gzip"):
        decode_volume(bytes(data))


def test_bombs_are_refused_before_they_take_memory(monkeypatch):
    bomb = compressed(nifti() + bytes(50_000_000))
    monkeypatch.setattr("workloads.data.volume.MAX_TAIL_BYTES", 10)
    with pytest.raises(MediaError, match="got 782 bytes"):
        decode_volume(bomb)
    huge = bytearray(nifti())
    huge[42:48] = np.array([30_000] * 3, np.int16).tobytes()
    for data in (bytes(huge), compressed(huge)):
        with pytest.raises(MediaError, match="at most"):
            decode_volume(data)
    with pytest.raises(MediaError, match="at most 100 voxels"):
        decode_volume(npy(VOXELS), max_voxels=100)


def test_noise_never_crashes():
    data, refused = nifti(), 0
    for _ in range(300):
        damaged = bytearray(data)
        for place in RNG.integers(0, 352, 4):
            damaged[place] = RNG.integers(256)
        try:
            assert np.isfinite(decode_volume(bytes(damaged)).voxels).all()
        except MediaError:
            refused += 1
    assert 0 < refused < 300


def test_labels_are_whole_numbers():
    labels = decode_labels(nifti(VOXELS.astype(np.uint8)))
    assert labels.dtype == np.int32 and np.array_equal(labels, VOXELS.T)
    for wrong in (VOXELS + 0.5, VOXELS * 1e30, np.stack([VOXELS] * 2, axis=3)):
        with pytest.raises(MediaError, match="class numbers"):
            decode_labels(nifti(wrong))


def test_real_volumes_and_labels(data_folder):
    with tarfile.open(data_folder / "hippocampus" / "val-000000.tar") as tar:
        data = {name: tar.extractfile(name).read() for name in tar.getnames()}
    seen = set()
    for name in (name for name in data if name.endswith(".seg.nii.gz")):
        volume, labels = decode_volume(data[name.replace(".seg", "")]), decode_labels(data[name])
        assert volume.voxels.shape == (1, *labels.shape) and volume.spacing_mm == (1, 1, 1)
        seen |= set(np.unique(labels).tolist())
    assert seen == {0, 1, 2} and len(data) == 56
