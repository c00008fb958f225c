"""Linear segmentation: the measure by hand, the layer on maps whose answer is known, and all of it on shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset

from tests.learning import here, pretrained
from tests.toy import png
from workloads.evaluation.base import Subject
from workloads.evaluation.segmentation import Dense, Segmentation, SegmentationConfig, mean_iou, segment
from workloads.spec import JobSpec

STREAMS = {"train": {"shards": "a.tar"}, "test": {"shards": "b.tar"}}


def config(**fields: object) -> SegmentationConfig:
    return SegmentationConfig.model_validate({"data": STREAMS, "epochs": 30, "batch_size": 4} | fields)


def test_mean_iou_by_hand() -> None:
    truth = torch.tensor([[0, 0, 0, 1], [1, 1, 9, 9]])
    answer = torch.tensor([[0, 0, 1, 1], [1, 0, 2, 0]])
    # class 0: 2 of 4, class 1: 2 of 4, class 2 is answered only where nothing counts, class 3 is nowhere
    assert mean_iou(answer, truth, classes=4, ignore=9) == 0.5
    answer[0, 0] = 2  # then class 2 has a union and no intersection
    assert mean_iou(answer, truth, classes=4, ignore=9) == pytest.approx((1 / 4 + 2 / 4 + 0) / 3)


def quadrants(n: int, noise: float, seed: int) -> Dense:
    """Maps of 4 x 4 places, masks of 8 x 8 pixels; each quadrant is of one of three classes, as its places say."""
    generator = torch.Generator().manual_seed(seed)
    classes = torch.randint(3, (n, 2, 2), generator=generator)
    places = classes.repeat_interleave(2, 1).repeat_interleave(2, 2)
    x = torch.nn.functional.one_hot(places, 3).permute(0, 3, 1, 2).float()
    y = places.repeat_interleave(2, 1).repeat_interleave(2, 2).to(torch.uint8)
    return Dense(x * 100 + noise * torch.randn(x.shape, generator=generator), y)


def test_it_learns_what_the_maps_say_and_only_that() -> None:
    known = segment(quadrants(24, 1.0, 0), quadrants(24, 1.0, 1), config(), seed=0)
    assert known > 0.9  # edges are blurred by the resizing
    assert known == segment(quadrants(24, 1.0, 0), quadrants(24, 1.0, 1), config(), seed=0)
    assert segment(quadrants(24, 1e4, 0), quadrants(24, 1e4, 1), config(), seed=0) < 0.45


def test_pixels_that_do_not_count_teach_nothing_and_are_not_asked() -> None:
    train, test = quadrants(24, 1.0, 0), quadrants(24, 1.0, 1)
    for part in (train, test):
        part.y[:, :, :4] = 7
    value = segment(train, test, config(ignore=7), seed=0)
    assert value > 0.9
    train.x[:, :, :, 0] = test.x[:, :, :, 0]  # left edge, far from what counts
    assert segment(train, test, config(ignore=7), seed=0) > 0.9


def test_masks_without_anything_that_counts_are_refused() -> None:
    train, test = quadrants(8, 1.0, 0), quadrants(8, 1.0, 1)
    for part in (train, test):
        part.y[:] = 255
    with pytest.raises(ValueError, match="set `ignore`"):
        segment(train, test, config(), seed=0)


@pytest.fixture(scope="module")
def masks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """Images of a bright half on a dark one, by columns or by rows, which the mask says."""
    folder, rng = tmp_path_factory.mktemp("masks"), np.random.default_rng(0)
    for name in ("train", "test"):
        with webdataset.TarWriter(str(folder / f"{name}-000000.tar"), mtime=0) as writer:
            for i in range(12):
                mask = np.zeros((16, 16), np.uint8)
                mask[(slice(None), slice(8)) if i % 2 else (slice(8), slice(None))] = 1
                pixels = (40 + 160 * mask + rng.integers(0, 20, mask.shape)).astype(np.uint8)
                writer.write({"__key__": f"{i:03d}", "png": png(np.stack([pixels] * 3, axis=2)), "seg.png": png(mask)})
    return {name: {"shards": str(folder / f"{name}-000000.tar")} for name in ("train", "test")}


@pytest.mark.parametrize("size", [None, 32])
def test_it_runs_on_the_encoder_and_on_the_untrained_one(
    masks: dict[str, dict[str, str]], toy_job: Callable[..., JobSpec], tmp_path: Path, size: int | None
) -> None:
    spec = toy_job(model={"name": "resnet_cifar", "image_size": 16, "depth": 8}, method={"name": "simclr"}, epochs=1)
    spec = spec.model_copy(update={"micro_batch_size": None})
    subject = Subject(spec, pretrained(spec, tmp_path, "job"), tmp_path, tmp_path, "job", lambda: False, here(tmp_path))
    found = Segmentation().run(config(data=masks, size=size, seeds=[0, 1], epochs=10), subject)
    assert (found["label"], found["metric"]) == ("segmentation", "mIoU")
    assert set(found["results"]) == {"pretrained", "untrained"}
    assert all(0.6 < value["mean"] <= 1 and len(value["seeds"]) == 2 for value in found["results"].values())
