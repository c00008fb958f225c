"""Fine-tuning on few labelled volumes: the measures by hand, and all of it on scans whose organs are plain to see."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from tests.learning import here, pretrained
from tests.toy_methods import toy_method_job
from tests.toy_volumes import scan, write_volumes
from workloads import assemble
from workloads.data.manifest import DataError
from workloads.evaluation.base import Subject
from workloads.evaluation.volume_segmentation import (
    VolumeSegmentation,
    VolumeSegmentationConfig,
    augmented,
    dice,
    dice_loss,
    fine_tuned_dice,
    read,
    seen_volume,
)
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.unet import UNet
from workloads.spec import JobSpec, Stream


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    shards = write_volumes(tmp_path_factory.mktemp("scans") / "scans", {"train": 8, "test": 4})
    return {name: {"shards": pattern} for name, pattern in shards.items()}


def test_dice_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1, 1], [1, 1, 2, 0]])
    answer = torch.tensor([[0, 1, 1, 1], [0, 0, 2, 2]])
    # class 1: 2 of 4 and 3; class 2: 1 of 1 and 2; class 3 is nowhere; the background does not count
    assert dice(answer, truth, 4) == pytest.approx((4 / 7 + 2 / 3) / 2)
    assert dice(torch.zeros(5).long(), torch.zeros(5), 3) == 1 and dice(torch.ones(5).long(), torch.zeros(5), 3) == 0


def test_dice_loss_by_hand() -> None:
    y = torch.tensor([[[0, 1], [1, 1]]])
    p = torch.tensor([[[0.9, 0.2], [0.3, 0.4]]])  # of class 0
    zero, one = 2 * 0.9 / (1.8 + 1), 2 * (0.8 + 0.7 + 0.6) / (0.1 + 0.8 + 0.7 + 0.6 + 3)
    logits = torch.stack([p, 1 - p], dim=1).log()
    assert dice_loss(logits, y).item() == pytest.approx(1 - (zero + one) / 2)
    right = 100 * F.one_hot(y, 2).movedim(-1, 1).float()
    assert dice_loss(right, y).item() == pytest.approx(0, abs=1e-6)
    nowhere = torch.cat([logits, torch.full((1, 1, 2, 2), -100.0)], dim=1)  # a class that the slice does not hold
    assert dice_loss(nowhere, y).item() == pytest.approx(1 - (zero + one) / 3)


def test_labels_are_moved_with_their_pixels() -> None:
    voxels, labels = (torch.from_numpy(each) for each in scan(0))
    x, y = labels[:, None].float(), labels
    u = 2 * torch.rand(len(x), 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    u[:, 4:] = 0  # intensities stay
    moved, classes = augmented(x.clamp(max=1), y, u)
    assert set(classes.unique().tolist()) == {0, 1, 2} and not torch.equal(classes, y.long())
    assert ((moved[:, 0] > 0.5) != (classes > 0)).float().mean() < 0.02
    same, still = augmented(voxels[:, None].float() / 255, y, torch.zeros(len(x), 6, dtype=torch.float64))
    assert torch.equal(still, y.long()) and torch.allclose(same[:, 0], voxels / 255, atol=1e-5)


def test_slices_are_those_that_the_volume_has(scans: dict[str, dict[str, str]], toy_shards: dict[str, str]) -> None:
    view = seen_volume(toy_method_job(toy_shards, "medical_cl"))
    assert view.size == (14, 16, 16) and not view.draws
    found = read(assemble.open_stream(Stream(**scans["test"])), view, "seg.nii.gz")
    for seed, (x, y) in enumerate(found, 8):
        voxels, labels = scan(seed)
        assert x.shape == (len(voxels), 1, 16, 16) and torch.equal(y, torch.from_numpy(labels))
        assert x.min() == 0 and x.max() == 1


@pytest.fixture
def subject(toy_shards: dict[str, str], tmp_path: Path) -> Subject:
    spec = toy_method_job(toy_shards, "medical_cl", epochs=None, steps=1)
    folder = pretrained(spec, tmp_path, "job")
    return Subject(spec, folder, tmp_path, tmp_path, "job", lambda: False, here(tmp_path))


def test_it_runs_and_is_the_same_again(scans: dict[str, dict[str, str]], subject: Subject) -> None:
    """A few steps find an organ or two."""
    config = VolumeSegmentationConfig.model_validate({"data": scans, "seeds": [0, 1], "steps": 60, "lr": 1e-2})
    found = VolumeSegmentation().run(config, subject)
    assert found is not None and (found["label"], found["metric"]) == ("volume_segmentation2", "Dice")
    assert set(found["results"]) == {"pretrained", "untrained"}
    for value in found["results"].values():
        assert all(0.3 < one <= 1 for one in value["seeds"]) and value["seeds"][0] != value["seeds"][1], value
    again = VolumeSegmentation().run(config.model_copy(update={"seeds": (1,), "untrained": False}), subject)
    assert again is not None and again["results"]["pretrained"]["seeds"] == found["results"]["pretrained"]["seeds"][1:]


def test_more_labelled_volumes_than_there_are(scans: dict[str, dict[str, str]], subject: Subject) -> None:
    config = VolumeSegmentationConfig.model_validate({"data": scans, "labelled_volumes": 9})
    with pytest.raises(DataError, match="expected at most the 8 that there are"):
        VolumeSegmentation().run(config, subject)


def test_a_stop_between_two_seeds_gives_no_result(scans: dict[str, dict[str, str]], subject: Subject) -> None:
    config = VolumeSegmentationConfig.model_validate({"data": scans, "steps": 1})
    stopped = Subject(**{**vars(subject), "should_stop": lambda: True})
    assert VolumeSegmentation().run(config, stopped) is None


def test_other_networks_and_other_data_are_refused(
    scans: dict[str, dict[str, str]], toy_job: Callable[..., JobSpec], toy_shards: dict[str, str]
) -> None:
    with pytest.raises(ValueError, match="which looks at no volumes"):
        seen_volume(toy_job())
    view = seen_volume(toy_method_job(toy_shards, "medical_cl"))
    manifests = [assemble.open_stream(Stream(**scans[name])) for name in ("train", "test")]
    config = VolumeSegmentationConfig.model_validate({"data": scans, "steps": 1})
    with pytest.raises(ValueError, match="expected a U-Net"):
        fine_tuned_dice(ResNetCifar(8), *manifests, view, config, 0)
    assert math.isfinite(fine_tuned_dice(UNet((4, 8)), *manifests, view, config, 0))
