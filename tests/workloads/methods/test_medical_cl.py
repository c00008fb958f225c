"""The two stages on volumes (arXiv 2006.10511): what they look at, what they train, and whether it is worth it.

The golden numbers of the losses are in tests/workloads/parts/test_volume_contrast.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from tests.learning import encoder_of, pretrained, untrained
from tests.toy import no_load, png
from tests.toy_methods import toy_method_job
from workloads import artifact, assemble
from workloads.data.keys import sample_keys
from workloads.data.transforms.volume import VolumeGeometry
from workloads.estimate import estimate
from workloads.evaluation.features import Features
from workloads.evaluation.knn import knn_accuracy
from workloads.evaluation.volume_segmentation import read
from workloads.inference import Model
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.medical_cl import MedicalCL, MedicalCLConfig
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.unet import UNet
from workloads.parts.infonce import nt_xent
from workloads.parts.volume_contrast import global_terms
from workloads.preflight import check
from workloads.spec import JobSpec, Stream

START = Progress(step=0, epoch=0, total_steps=10)
LOCAL = {"method": {"name": "medical_cl", "depth": 14, "dim": 8, "loss": "lr"}}
LOCAL |= {"model": {"name": "unet", "image_size": 16, "channels": [4, 8, 8], "decoder_blocks": 1}}


def medical_cl(loss: str = "gd", *, encoder: nn.Module | None = None, **config: object) -> MedicalCL:
    """On slices of 16 x 16; maps of 4 x 4, and of 8 x 8 behind the block of the decoder."""
    torch.manual_seed(0)
    encoder = encoder or UNet((4, 8, 8), decoder_blocks=int(loss.startswith("l")))
    given = MedicalCLConfig.model_validate({"loss": loss, "depth": 12, "dim": 8, "hidden_dim": 16} | config)
    return MedicalCL(given, Inputs(encoder, DataInfo(8, 0, (3, 16, 16)), no_load, no_load))  # type: ignore[arg-type]


def batch(n: int = 3, depths: tuple[int, ...] = (8, 12, 14)) -> dict[str, Tensor]:
    """Each slice of a volume of `depths` slices has its number in all pixels; volumes are in the middle of 12."""
    volume, fields = torch.zeros(n, 1, 12, 16, 16), []
    for i in range(n):
        size = depths[i % len(depths)]
        corner = (size - 12) // 2
        inside = torch.arange(12) + corner
        values = torch.where((inside >= 0) & (inside < size), inside, -100)
        volume[i, 0] = values[:, None, None]
        fields.append((torch.tensor([size, 16, 16]), torch.tensor([corner, 0, 0]), torch.tensor([12, 16, 16])))
    size, corner, extent = (torch.stack(column) for column in zip(*fields, strict=True))
    geometry = VolumeGeometry(size, corner.double(), extent.double(), torch.zeros(n, 3) > 0, torch.ones(n, 3).double())
    key = sample_keys(0, 0, torch.arange(n))
    return {"volume": volume, "volume_geometry": geometry.packed(), "key": key, "index": torch.arange(n)}


def noise(n: int = 3) -> dict[str, Tensor]:
    """The same, of random voxels."""
    volume = torch.rand(n, 1, 12, 16, 16, generator=torch.Generator().manual_seed(1))
    return batch(n) | {"volume": volume}


def test_a_slice_of_each_partition_of_what_the_volume_has() -> None:
    """Of 8, of 12, and of the 12 in the middle of 14 slices, whatever the box; another one for another key."""
    drawn = torch.stack(
        [
            medical_cl().slices(batch() | {"key": sample_keys(0, epoch, torch.arange(3))})[:, :, 0, 0, 0]
            for epoch in range(50)
        ]
    )
    for volume, (first, size) in enumerate([(0, 2), (0, 3), (1, 3)]):
        for s in range(4):
            expected = {first + s * size + i for i in range(size)}
            assert set(drawn[:, volume, s].tolist()) == expected


def test_gr_draws_any_slices() -> None:
    method = medical_cl("gr")
    keys = (sample_keys(0, epoch, torch.arange(3)) for epoch in range(60))
    drawn = torch.stack([method.slices(batch() | {"key": key})[:, :, 0, 0, 0] for key in keys])
    assert set(drawn[:, 0].flatten().tolist()) == set(range(8)) == set(drawn[:, 0, 0].tolist())


def test_views_of_stage_1_are_crops_of_the_paper_and_change_intensities() -> None:
    """At 192 pixels: 100 of them from 10..69 on; each slice and each view has its own."""
    method = medical_cl()
    y, x = torch.meshgrid(torch.arange(192) / 192, torch.arange(192) / 192, indexing="ij")
    plain = {"brightness": 0, "contrast": 0}
    corners = set()
    for epoch in range(12):
        key = sample_keys(0, epoch, torch.arange(8))
        for axis, ramp in enumerate((y, x)):
            views = medical_cl(**plain).view(ramp.expand(8, 4, 1, 192, 192), key, "view0")
            along = views[:, :, 0].amin(dim=3 - axis)  # [8, 4, 192], rising
            step = along[..., 100] - along[..., 99]
            assert torch.allclose(step * 192, torch.full_like(step, 100 / 192), atol=1e-3)
            begin = along[..., 96] * 192 - 50 + 0.5 - 0.5 * 100 / 192
            assert torch.allclose(begin, begin.round(), atol=0.02)
            corners |= set(begin.round().flatten().int().tolist())
    assert corners == set(range(10, 70))
    slices, key = torch.full((16, 4, 1, 16, 16), 0.6), sample_keys(0, 0, torch.arange(16))
    views = method.view(slices, key, "view0")
    levels = views[:, :, 0, 0, 0]
    assert views.flatten(2).std(dim=2).max() < 1e-6 and len(levels.unique()) == 64
    assert 0.3 <= levels.min() < 0.4 and 0.8 < levels.max() <= 0.9
    assert not torch.equal(views, method.view(slices, key, "view1"))
    assert torch.equal(views, method.view(slices, key, "view0"))


def test_views_of_stage_2_stay_at_their_places() -> None:
    slices = noise()["volume"].transpose(1, 2)[:, :4]
    views = medical_cl("lr").view(slices, sample_keys(0, 0, torch.arange(3)), "view0")
    for one, other in zip(slices.flatten(0, 1).flatten(1), views.flatten(0, 1).flatten(1), strict=True):
        unclipped = (other > 0) & (other < 1.5)
        factor = (other[unclipped] - other[unclipped].mean()) / (one[unclipped] - one[unclipped].mean())
        assert 0.7 <= factor.median() <= 1.3 and torch.allclose(factor, factor.median(), atol=0.05)


@pytest.mark.parametrize("loss", ["gd", "gd_minus", "gr"])
def test_stage_1_is_the_loss_of_its_views(loss: str) -> None:
    method, data = medical_cl(loss), noise()
    x = method.slices(data)
    t = [method.view(x, data["key"], f"view{i}") for i in range(3)]
    views = {"gd": [x, t[1]], "gd_minus": [x, t[1], t[2]], "gr": [t[0], t[1]]}[loss]
    z = method.stage.g1(method.stage.encoder.forward_features(torch.stack(views, dim=1).flatten(0, 2)))
    z = z.view(3, len(views), 4, 8)
    if loss == "gr":
        expected = F.cross_entropy(*nt_xent(*(rows.reshape(12, 8) for rows in z.unbind(1)), 0.1))
    else:
        expected = global_terms(z, loss, 0.1).sum() / (3 * len(views) * 4)
    output = method(data, START)
    assert output.loss is not None and output.loss.item() == pytest.approx(expected.item(), rel=1e-5)
    assert 0 < output.metrics["positive_share"] < 1


def test_heads_are_those_of_the_card() -> None:
    hidden, last = (part for part in medical_cl(hidden_dim=1024, dim=128).stage.g1 if isinstance(part, nn.Linear))
    assert hidden.weight.shape == (1024, 8 * 4 * 4) and last.weight.shape == (128, 1024)
    assert hidden.bias is None and last.bias is None
    local = medical_cl("lr").stage
    assert [type(part) for part in local.g2] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d]
    assert all(part.bias is None and part.kernel_size == (1, 1) for part in local.g2 if isinstance(part, nn.Conv2d))
    assert local.project.weight.shape == (8, 9 * 8)


@pytest.mark.parametrize("loss", ["lr", "ld"])
def test_stage_2_is_the_loss_of_its_regions(loss: str) -> None:
    """Written out: cosines of windows of 3 x 3 at 13 places, of two views, or of two volumes."""
    method, data = medical_cl(loss), noise(2)
    stage: Any = method.stage
    x = method.slices(data)
    views = [method.view(x, data["key"], f"view{i}") for i in (0, 1)]
    maps = stage.g2(stage.encoder.forward_features(torch.stack(views, dim=1).flatten(0, 2)))
    assert maps.shape == (2 * 2 * 4, 8, 8, 8)
    f = torch.stack([maps[:, :, y : y + 3, x : x + 3].flatten(1) for y, x in stage._corners], dim=1)
    f = F.normalize(stage.project(f), dim=2).view(2, 2, 4, 13, 8)  # volume, view, partition, region

    def term(a: Tensor, b: Tensor, u: int) -> Tensor:
        negatives = [other for v in stage._negatives[u] for other in (a[v], b[v])]
        logits = torch.stack([a[u] @ b[u], *(a[u] @ other for other in negatives)]) / 0.1
        return F.cross_entropy(logits, torch.tensor(0))

    pairs = [(f[m, 0], f[m, 1]) for m in (0, 1)]
    if loss == "ld":
        for m in (0, 1):  # in a ring of two each is the other's next
            pairs += [(f[m, 0], f[1 - m, 0]), (f[1 - m, 0], f[1 - m, 1]), (f[m, 1], f[1 - m, 1])]
    terms = [
        term(one[s], other[s], u)
        for a, b in pairs
        for one, other in ((a, b), (b, a))
        for s in range(4)
        for u in range(13)
    ]
    output = method(data, START)
    assert output.loss is not None
    assert output.loss.item() == pytest.approx(torch.stack(terms).mean().item(), rel=1e-5)


@pytest.mark.parametrize("loss", ["lr", "ld"])
def test_stage_2_trains_the_decoder_only(loss: str) -> None:
    """The encoder is frozen, its BatchNorm goes by the batch."""
    method = medical_cl(loss)
    output = method(noise(), START)
    assert output.loss is not None
    output.loss.backward()
    stage: Any = method.stage
    assert all(not p.requires_grad and p.grad is None for p in stage.encoder.levels.parameters())
    trained = [p for part in (stage.encoder.decoder, stage.g2, stage.project) for p in part.parameters()]
    assert all(p.grad is not None for p in trained)
    grouped = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert grouped == {id(p) for p in trained}
    norm = stage.encoder.levels[0][0][2]
    assert norm.training and norm.num_batches_tracked == 1


def test_stage_1_trains_all() -> None:
    for loss in ("gd", "gd_minus", "gr"):
        method = medical_cl(loss)
        output = method(noise(), START)
        assert output.loss is not None
        output.loss.backward()
        assert all(p.grad is not None and p.grad.any() for p in method.parameters())


def test_the_view_is_the_box_of_the_paper() -> None:
    view = MedicalCL.views(MedicalCLConfig(depth=20, spacing_mm=(1.367, 1.367)), 192)["volume"]
    assert (view.size, view.spacing_mm) == ((20, 192, 192), (None, 1.367, 1.367))
    assert (view.clip_percentiles, view.normalise, view.crop, view.draws) == ((1, 99), "minmax", "center", False)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a U-Net; use model"):
        medical_cl(encoder=ResNetCifar(8))
    with pytest.raises(ValueError, match="leave them out, or take loss: lr"):
        medical_cl("gd", encoder=UNet((4, 8, 8), decoder_blocks=1))
    with pytest.raises(ValueError, match="set decoder_blocks of the model"):
        medical_cl("lr", encoder=UNet((4, 8, 8)))
    with pytest.raises(ValueError, match="got maps of 4 x 4, expected at least 7"):
        medical_cl("lr", encoder=UNet((4, 8, 8, 8), decoder_blocks=1))
    with pytest.raises(ValueError, match="got a batch of one volume"):
        medical_cl()(noise(1), START)
    with pytest.raises(ValidationError, match="1 - crop"):
        MedicalCLConfig(depth=12, crop=0.9)
    with pytest.raises(ValidationError, match="depth"):
        MedicalCLConfig()  # type: ignore[call-arg]


def test_both_stages_and_what_they_export(toy_shards: dict[str, str], tmp_path: Path) -> None:
    """Stage 2 starts from the network of stage 1 and leaves its encoder as it is, but for the statistics."""
    first = toy_method_job(toy_shards, "medical_cl", epochs=None, steps=3)
    assert check(first, tmp_path) == []
    before: Any = encoder_of(pretrained(first, tmp_path, "first"))
    card = artifact.read_card(tmp_path / "runs" / "first" / "artifact")
    assert (card.image_size, card.mean, card.std) == (16, (0, 0, 0), (1, 1, 1)), "images are served as slices are seen"
    slices = np.full((20, 20, 3), 51, np.uint8)
    (served,) = Model(tmp_path / "runs" / "first" / "artifact").embed([png(slices)])
    with torch.no_grad():
        assert torch.allclose(before(torch.full((1, 1, 16, 16), 0.2))[0], torch.tensor(served), atol=1e-5)
    second = toy_method_job(toy_shards, "medical_cl", epochs=None, steps=3, init="job:first", **LOCAL)
    assert check(second, tmp_path) == []
    assert estimate(second, tmp_path).trained < estimate(second, tmp_path).parameters
    after: Any = encoder_of(pretrained(second, tmp_path, "second"))
    start: Any = untrained(second)
    for name, parameter in after.levels.named_parameters():
        assert torch.equal(parameter, before.levels.get_parameter(name))
    assert not torch.equal(after.levels[0][0][2].running_mean, before.levels[0][0][2].running_mean)
    for name, parameter in after.decoder.named_parameters():
        assert not torch.equal(parameter, start.decoder.get_parameter(name))


def partitions_of(encoder: nn.Module, shards: str, spec: JobSpec) -> Features:
    """Features of all slices that belong to a partition, and its number."""
    view: Any = assemble.views_of(spec)["volume"]
    x, y = [], []
    for slices, _ in read(assemble.open_stream(Stream(shards=shards)), view, "seg.nii.gz"):
        size = len(slices) // 4
        x.append(slices[: 4 * size])
        y.append(torch.arange(4).repeat_interleave(size))
    with torch.inference_mode():
        return Features(encoder.eval()(torch.cat(x)), torch.cat(y))


@pytest.mark.slow
def test_slices_of_a_partition_have_like_features(data_folder: Path, tmp_path: Path) -> None:
    """Which quarter of another hippocampus a slice is of, by its neighbours: .802 -> .868 (200 steps: .887).

    The encoder sees one slice at a time: that slices at one height are alike in all volumes is all that it is told.
    """
    train, val = (str(data_folder / "hippocampus" / f"{name}.tar") for name in ("train-{000000..000003}", "val-000000"))
    spec = JobSpec.model_validate(
        {
            "name": "learning",
            "method": {"name": "medical_cl", "loss": "gd", "depth": 48},
            "model": {"name": "unet", "image_size": 48, "channels": [8, 16, 32, 32]},
            "data": {"train": {"shards": train}},
            "steps": 100,
            "batch_size": 6,
            "optimizer": {"name": "adamw", "lr": 1e-3, "weight_decay": 0},
            "schedule": {"name": "constant"},
        }
    )
    after = encoder_of(pretrained(spec, tmp_path, "job"))
    before, now = (
        knn_accuracy(*(partitions_of(encoder, each, spec) for each in (train, val)), k=20, temperature=0.07)
        for encoder in (untrained(spec), after)
    )
    assert now > before + 0.03, (before, now)
