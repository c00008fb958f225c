import io
import tarfile

import nibabel
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from workloads.data.records import MediaError
from workloads.data.transforms.volume import (
    NNUNET,
    LabelsView,
    VolumeGeometry,
    VolumeView,
    draw,
    execute,
    execute_labels,
)

RNG = np.random.default_rng(0)
ALWAYS_ZOOM = NNUNET["zoom"].model_copy(update={"p": 1.0})
RAW = {"window": (0, 1), "normalise": "minmax"}  # voxels of [0, 1] come as they are


def npy(voxels):
    file = io.BytesIO()
    np.save(file, np.asarray(voxels))
    return file.getvalue()


def nifti(voxels, spacing):
    return nibabel.Nifti1Image(voxels.T, np.diag([*spacing[::-1], 1])).to_bytes()


def test_random_crops_are_parts_of_the_volume_and_reach_all_of_it():
    voxels = RNG.random((6, 5, 7), np.float32)
    view = VolumeView(size=(4, 5, 3), crop="random", **RAW)
    boxes, geometry = execute(view, [npy(voxels)] * 60, torch.arange(60), "v")
    assert boxes.shape == (60, 1, 4, 5, 3)
    for box, corner in zip(boxes, geometry.corner.long().tolist(), strict=True):
        z, y, x = corner
        assert torch.equal(box[0], torch.from_numpy(voxels[z : z + 4, y : y + 5, x : x + 3].copy()))
    assert [sorted(set(column)) for column in geometry.corner.T.tolist()] == [[0, 1, 2], [0], [0, 1, 2, 3, 4]]


def test_a_small_volume_is_padded_in_the_middle():
    voxels = RNG.random((2, 3, 9), np.float32)
    for crop in ("random", "center"):
        view = VolumeView(size=(4, 5, 3), crop=crop, **RAW)
        boxes, geometry = execute(view, [npy(voxels)], torch.zeros(1, dtype=torch.int64))
        x = int(geometry.corner[0, 2])
        assert torch.equal(boxes[0, 0, 1:3, 1:4], torch.from_numpy(voxels[:, :, x : x + 3].copy()))
        assert boxes.count_nonzero() == np.count_nonzero(voxels[:, :, x : x + 3])
        labels = execute_labels(LabelsView(), [npy(np.ones((2, 3, 9), np.uint8))], geometry, view.size)
        assert torch.equal(labels[0] == 1, boxes[0, 0] != 0) and set(labels.unique().tolist()) == {1, 255}


def test_flips_mirror_their_axis():
    voxels = RNG.random((3, 4, 5), np.float32)
    for axis in range(3):
        view = VolumeView(size=(3, 4, 5), flip=tuple(float(i == axis) for i in range(3)), **RAW)
        boxes, _ = execute(view, [npy(voxels)], torch.zeros(1, dtype=torch.int64))
        assert torch.equal(boxes[0, 0], torch.from_numpy(np.flip(voxels, axis).copy()))


@pytest.mark.parametrize("crop", ["random", "center"])
@pytest.mark.parametrize("spacing_mm", [None, (1.0, 0.7, 1.5)])
def test_labels_follow_their_volume(spacing_mm, crop):
    """A bright box in a dark volume, and its label: cut, resampled, zoomed and mirrored they stay on each other."""
    voxels = np.zeros((30, 40, 35), np.float32)
    voxels[8:24, 10:30, 5:25] = 1
    volume, labels = nifti(voxels, (1.0, 1.0, 2.0)), nifti(voxels.astype(np.uint8), (1.0, 1.0, 2.0))
    view = VolumeView(
        size=(16, 20, 24), crop=crop, spacing_mm=spacing_mm, flip=(0.5, 0.5, 0.5), zoom=ALWAYS_ZOOM, **RAW
    )
    boxes, geometry = execute(view, [volume] * 12, torch.arange(12))
    classes = execute_labels(LabelsView(fill=0), [labels] * 12, geometry, view.size)
    assert 0.1 < classes.float().mean() < 0.9
    assert ((boxes[:, 0] > 0.5) != (classes == 1)).float().mean() < 0.04
    assert geometry.spacing_mm[0].tolist() == list(spacing_mm or (1, 1, 2))


def test_resampling_keeps_millimetres():
    """A ramp along W of 2 mm voxels, seen at 1 mm, rises half as fast and is as wide."""
    ramp = np.broadcast_to(np.arange(16, dtype=np.float32) / 16, (4, 4, 16)).copy()
    view = VolumeView(size=(4, 4, 32), spacing_mm=(1, 1, 1), **RAW)
    boxes, geometry = execute(view, [nifti(ramp, (1.0, 1.0, 2.0))])
    assert geometry.extent[0].tolist() == [4, 4, 16]
    assert torch.allclose(boxes[0, 0, 0, 0, 1:-1].diff(), torch.full((29,), 1 / 32))


def test_an_axis_may_keep_its_spacing():
    """In plane at 1 mm, along D as in the file: slices are not mixed."""
    voxels = RNG.random((5, 6, 8)).astype(np.float32)
    view = VolumeView(size=(5, 12, 8), spacing_mm=(None, 1, 1), **RAW)
    boxes, geometry = execute(view, [nifti(voxels, (7.5, 2.0, 1.0))])
    assert geometry.spacing_mm[0].tolist() == [7.5, 1, 1] and geometry.extent[0].tolist() == [5, 6, 8]
    for box, plane in zip(boxes[0, 0], torch.from_numpy(voxels), strict=True):
        wide = torch.nn.functional.interpolate(plane[None, None], size=(12, 8), mode="bilinear")[0, 0]
        assert torch.allclose(box, wide, atol=1e-5)


def test_the_geometry_says_what_the_volume_covers():
    """Every voxel of a bright volume within the box, and none outside, whichever way it is cut, resampled or turned."""
    shapes = [(4, 9, 6), (12, 3, 6), (6, 6, 6)]
    data = [nifti(np.ones(shape, np.float32), (1.0, 2.0, 1.5)) for shape in shapes]
    for spacing_mm in (None, (1.0, 1.0, 1.0), (None, 0.7, 3.1)):
        view = VolumeView(size=(8, 7, 5), crop="random", flip=(0.5, 0.5, 0.5), spacing_mm=spacing_mm, **RAW)
        boxes, geometry = execute(view, data, torch.arange(3))
        packed = geometry.packed()
        assert packed.shape == (3, 5, 3) and packed.dtype == torch.float64
        first, count = VolumeGeometry.unpacked(packed).covered(view.size)
        for box, begin, n in zip(boxes[:, 0], first.tolist(), count.tolist(), strict=True):
            part = tuple(slice(b, b + c) for b, c in zip(begin, n, strict=True))
            assert box[part].gt(0).all() and box.gt(0).sum() == box[part].numel()


def test_normalisation():
    voxels = RNG.normal(50, 9, (2, 12, 12, 12)).astype(np.float32) * np.array([1, 4], np.float32)[:, None, None, None]
    voxels[0, 0, 0, 0] = 1e6
    plain, _ = execute(VolumeView(size=(12, 12, 12), clip_percentiles=(0.5, 99.5)), [npy(voxels)])
    assert torch.allclose(plain.mean((2, 3, 4)), torch.zeros(1, 2), atol=1e-3)
    assert torch.allclose(plain.std((2, 3, 4)), torch.ones(1, 2), atol=1e-2) and plain.max() < 4
    low, high = np.percentile(voxels[1], (5, 95))
    scaled, _ = execute(VolumeView(size=(12, 12, 12), clip_percentiles=(5, 95), normalise="minmax"), [npy(voxels[1:])])
    assert torch.allclose(
        scaled[0, 0], torch.from_numpy(((voxels[1] - low) / (high - low)).clip(0, 1)).float(), atol=1e-5
    )
    flat, _ = execute(VolumeView(size=(2, 2, 2)), [npy(np.full((2, 2, 2), 7.0))])
    assert flat.eq(0).all()


def test_each_jitter_does_what_it_says():
    voxels = RNG.random((8, 8, 8), np.float32)
    keys, shared = torch.arange(20), {"size": (8, 8, 8), **RAW}
    plain, _ = execute(VolumeView(**shared), [npy(voxels)] * 20)

    def jittered(name):
        return execute(
            VolumeView(**shared, **{name: NNUNET[name].model_copy(update={"p": 1.0})}), [npy(voxels)] * 20, keys
        )[0]

    ratio = (jittered("brightness") / plain.clamp(min=1e-9)).flatten(1)
    assert torch.allclose(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-3) and len(ratio[:, 0].unique()) == 20
    assert 0.75 <= ratio.min() < 0.9 and 1.1 < ratio.max() <= 1.2501
    contrast = jittered("contrast")
    assert contrast.amin() >= plain.amin() and contrast.amax() <= plain.amax()
    assert (contrast.flatten(1).std(1) < plain[0].std()).any() and (contrast.flatten(1).std(1) > plain[0].std()).any()
    gamma = jittered("gamma").flatten(1)
    assert torch.allclose(gamma.mean(1), plain[0].mean(), atol=1e-5)
    assert torch.allclose(gamma.std(1, correction=0), plain[0].std(correction=0).expand(20), atol=1e-4)
    assert torch.equal(gamma.argsort(1), plain.flatten(1).argsort(1)) and not torch.equal(gamma[0], gamma[1])


def test_probabilities_of_jitter():
    view = VolumeView(size=(4, 4, 4), zoom=NNUNET["zoom"])
    size = torch.full((4000, 3), 9)
    zoom = 4 / draw(view, size, torch.ones(4000, 3).double(), torch.arange(4000)).extent[:, 0]
    changed = zoom[zoom != 1]
    assert abs(len(changed) / 4000 - 0.2) < 0.02 and abs((changed < 1).double().mean() - 0.5) < 0.06
    assert 0.7 <= changed.min() < 0.71 and 1.39 < changed.max() <= 1.4


def test_a_volume_does_not_depend_on_its_batch():
    data = [npy(RNG.random((2, n, 12, 9), np.float32)) for n in (5, 14, 9, 8)] * 2
    labels = [npy(RNG.integers(0, 3, (n, 12, 9))) for n in (5, 14, 9, 8)] * 2
    view = VolumeView(size=(6, 6, 6), crop="random", flip=(0.5, 0.5, 0.5), spacing_mm=(0.9, 1.1, 1), **NNUNET)
    keys = torch.arange(8) * 31
    together, geometry = execute(view, data, keys, "v")
    classes = execute_labels(LabelsView(), labels, geometry, view.size)
    for i in range(8):
        alone, one = execute(view, data[i : i + 1], keys[i : i + 1], "v")
        assert torch.equal(alone[0], together[i]) and torch.equal(one.corner[0], geometry.corner[i])
        assert torch.equal(execute_labels(LabelsView(), labels[i : i + 1], one, view.size)[0], classes[i])
    assert torch.equal(execute(view, data, keys, "v")[0], together)
    assert not torch.equal(execute(view, data, keys, "w")[0], together)


@settings(max_examples=60, deadline=None)
@given(st.tuples(*[st.integers(1, 9)] * 3), st.tuples(*[st.integers(1, 9)] * 3), st.integers(0, 2**60))
def test_any_size_gives_the_size_of_the_view(size, wanted, key):
    view = VolumeView(size=wanted, crop="random", flip=(0.5, 0.5, 0.5), **NNUNET)
    volume = npy(np.ones(size, np.float32))
    boxes, geometry = execute(view, [volume], torch.tensor([key]))
    assert boxes.shape == (1, 1, *wanted) and boxes.isfinite().all()
    labels = execute_labels(LabelsView(), [volume], geometry, wanted)
    assert set(labels.unique().tolist()) <= {1, 255}
    assert min(size) < 2 or (labels == 1).any()  # one voxel may lie between two that are looked at


def test_what_does_not_fit_together_is_refused():
    one, two = npy(np.zeros((3, 3, 3))), npy(np.zeros((2, 3, 3, 3)))
    view = VolumeView(size=(2, 2, 2))
    with pytest.raises(MediaError, match="1 and 2 channels"):
        execute(view, [one, two])
    _, geometry = execute(view, [one])
    with pytest.raises(MediaError, match=r"labels of \(3, 3, 4\)"):
        execute_labels(LabelsView(), [npy(np.zeros((3, 3, 4)))], geometry, view.size)
    with pytest.raises(MediaError):
        execute(view, [one[:-1]])
    with pytest.raises(AssertionError, match="keys"):
        execute(VolumeView(size=(2, 2, 2), crop="random"), [one])


@pytest.mark.parametrize(
    ("wrong", "why"),
    [
        ({"size": (0, 1, 1)}, "size"),
        ({"spacing_mm": (0, 1, 1)}, "spacing_mm"),
        ({"spacing_mm": (None, float("inf"), 1)}, "spacing_mm"),
        ({"flip": (0, 2, 0)}, "flip"),
        ({"window": (1, 0)}, "low < high"),
        ({"clip_percentiles": (50, 101)}, "clip_percentiles"),
        ({"window": (0, 1), "clip_percentiles": (1, 99)}, "one of them"),
        ({"zoom": {"low": 1.1, "high": 2, "p": 1}}, "low"),
        ({"sise": 1}, "sise"),
    ],
)
def test_wrong_views_are_refused(wrong, why):
    with pytest.raises(ValidationError, match=why):
        VolumeView(**{"size": (2, 2, 2), **wrong})


def test_real_volumes(data_folder):
    with tarfile.open(data_folder / "hippocampus" / "val-000000.tar") as tar:
        names = [name for name in tar.getnames() if ".seg" not in name][:6]
        data = [tar.extractfile(name).read() for name in names]
        labels = [tar.extractfile(name.replace(".nii", ".seg.nii")).read() for name in names]
    view = VolumeView(size=(32, 48, 32), crop="random", flip=(0.5, 0.5, 0.5), **NNUNET)
    boxes, geometry = execute(view, data, torch.arange(6))
    classes = execute_labels(LabelsView(), labels, geometry, view.size)
    assert boxes.shape == (6, 1, 32, 48, 32) and set(classes.unique().tolist()) <= {0, 1, 2, 255}
    assert (classes.flatten(1) == 1).any(1).all()
