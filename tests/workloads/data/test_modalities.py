import io
import json

import numpy as np
import pytest
import torch

from workloads.data.manifest import DataError, build_manifest
from workloads.data.modalities import ArrayView, CaptionsView
from workloads.data.reader import Reader
from workloads.data.transforms.randaugment import RandAugment
from workloads.data.transforms.targets import BoxesView, MaskView
from workloads.data.transforms.video import ClipView
from workloads.data.transforms.volume import LabelsView, VolumeView
from workloads.data.views import View


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def manifest_of(tmp_path, write_tar, samples: list[dict[str, bytes]]):
    members = [(f"{i:03d}.{suffix}", data) for i, sample in enumerate(samples) for suffix, data in sample.items()]
    write_tar(tmp_path / "x.tar", members)
    return build_manifest(str(tmp_path / "x.tar"))


@pytest.fixture
def scenes(tmp_path, write_tar, encoded):
    """Eight images with one bright square each, its mask, its box, its number as an array, and captions."""
    rng, samples = np.random.default_rng(0), []
    for i in range(8):
        x, y = (int(v) for v in rng.integers(4, 20, 2))
        pixels, mask = np.zeros((40, 40, 3), np.uint8), np.zeros((40, 40), np.uint8)
        pixels[y : y + 16, x : x + 16], mask[y : y + 16, x : x + 16] = 255, 1
        samples.append(
            {
                "png": encoded(pixels),
                "seg.png": encoded(mask),
                "json": json.dumps({"boxes": [[x, y, x + 16, y + 16]], "labels": [3]}).encode(),
                "npy": npy(np.full(2, i, np.float32)),
                "txt": f"square {i}\nat {x} {y}".encode(),
            }
        )
    return manifest_of(tmp_path, write_tar, samples)


VIEWS = {
    "image": View(size=32, crop_scale=(0.4, 0.8), flip=0.5),
    "mask": MaskView(),
    "boxes": BoxesView(most=2),
    "number": ArrayView(),
    "captions": CaptionsView(),
}


def test_masks_and_boxes_follow_their_image_and_the_rest_comes_along(scenes):
    batch = Reader(scenes, VIEWS, batch_size=8).batch(3)
    bright = batch["image"][:, 0] > 127
    agree = (bright == (batch["mask"] == 1)).float().mean(dim=(1, 2))
    assert agree.min() > 0.95
    for i in range(8):
        x0, y0, x1, y1 = batch["boxes"][i, 0]
        if batch["boxes_label"][i, 0] == 3:
            ys, xs = bright[i].nonzero(as_tuple=True)
            seen = torch.stack([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]).float()
            assert (seen - torch.stack([x0, y0, x1, y1])).abs().max() <= 1.5
    assert batch["boxes_label"][:, 1].tolist() == [-1] * 8
    assert batch["number"][:, 0].tolist() == batch["index"].tolist()
    assert [lines[0] for lines in batch["captions"]] == [f"square {i}" for i in batch["index"]]


def test_a_sample_is_the_same_in_any_batch(scenes):
    whole = Reader(scenes, VIEWS, batch_size=8).batch(1)
    halves = [Reader(scenes, VIEWS, batch_size=8).batch(1, rank, 2) for rank in range(2)]
    for name, value in whole.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(torch.cat([half[name] for half in halves]), value), name
        else:
            assert halves[0][name] + halves[1][name] == value


def test_a_sample_without_its_mask_is_counted_and_replaced(tmp_path, write_tar, encoded):
    image, mask = encoded(np.zeros((8, 8, 3), np.uint8)), encoded(np.zeros((8, 8), np.uint8))
    samples = [{"png": image, "seg.png": mask} for _ in range(6)]
    del samples[2]["seg.png"]
    manifest = manifest_of(tmp_path, write_tar, samples)
    views = {"image": View(size=8), "mask": MaskView()}
    reader = Reader(manifest, views, batch_size=6, shuffle=False, max_bad_share=0.5)
    index = reader.batch(0)["index"].tolist()
    assert index[:2] + index[3:] == [0, 1, 3, 4, 5] and index[2] != 2
    assert list(reader.skipped) == [2] and "got no seg.png" in reader.skipped[2]


def test_volumes_and_their_labels(tmp_path, write_tar):
    rng = np.random.default_rng(1)
    samples = []
    for _ in range(4):
        labels = rng.integers(0, 3, (10, 12, 9)).astype(np.uint8)
        samples.append({"npy": npy(labels.astype(np.float32)), "seg.npy": npy(labels)})
    manifest = manifest_of(tmp_path, write_tar, samples)
    views = {
        "volume": VolumeView(member="npy", size=(6, 8, 8), crop="random", flip=(0.5, 0.5, 0.5)),
        "labels": LabelsView(member="seg.npy"),
    }
    batch = Reader(manifest, views, batch_size=4).batch(0)
    assert batch["volume"].shape == (4, 1, 6, 8, 8) and batch["labels"].shape == (4, 6, 8, 8)
    assert batch["volume_geometry"][:, 0].tolist() == [[10, 12, 9]] * 4, "the sizes of the volumes"
    for volume, labels in zip(batch["volume"][:, 0], batch["labels"], strict=True):
        values = [volume[labels == label] for label in range(3)]
        assert all(float(value.max() - value.min()) < 1e-5 for value in values), "a voxel keeps its label"


def test_clips_of_real_videos(real_data):
    manifest = build_manifest(str(real_data("video/weizmann4") / "test-*.tar"))
    views = {"clip": ClipView(frames=8, stride=2, size=32, crop_scale=(0.5, 1), flip=0.5)}
    reader = Reader(manifest, views, batch_size=4)
    batch = reader.batch(1)
    assert batch["clip"].shape == (4, 3, 8, 32, 32) and batch["clip_time_s"].shape == (4, 8)
    assert (batch["clip_time_s"].diff(dim=1) > 0).all() and not reader.skipped
    assert (batch["clip"].float().std(dim=2) > 1).any(), "people move"
    assert torch.equal(torch.cat([reader.batch(1, rank, 2)["clip"] for rank in range(2)]), batch["clip"])


def test_a_damaged_video_is_counted_and_replaced(tmp_path, write_tar, real_data):
    source = build_manifest(str(real_data("video/shapes3") / "test-*.tar"))
    from workloads.data.ranged import read_members

    data = read_members(source, "video", np.arange(3))
    manifest = manifest_of(
        tmp_path, write_tar, [{"mp4": data[0]}, {"mp4": data[1][: len(data[1]) // 2]}, {"mp4": data[2]}]
    )
    reader = Reader(manifest, {"clip": ClipView(frames=4, size=16)}, batch_size=3, max_bad_share=0.5)
    assert 1 not in reader.batch(0)["index"].tolist() and list(reader.skipped) == [1]


def test_a_view_of_what_the_samples_do_not_hold_is_refused(scenes):
    with pytest.raises(DataError, match="a view of 'video'"):
        Reader(scenes, {"clip": ClipView(frames=4, size=16)}, batch_size=2)


@pytest.mark.parametrize(
    ("views", "message"),
    [
        ({"mask": MaskView(), "image": View(size=8)}, "got mask that follows image, expected an image view named"),
        ({"image": ArrayView(), "mask": MaskView()}, "expected an image view named before it"),
        ({"image": View(size=8), "labels": LabelsView(follows="image")}, "expected a volume view named before it"),
        ({"image": View(size=8, randaugment=RandAugment()), "boxes": BoxesView()}, "randaugment moves pixels"),
    ],
)
def test_views_that_cannot_follow_are_refused(scenes, views, message):
    with pytest.raises(DataError, match=message):
        Reader(scenes, views, batch_size=2)
