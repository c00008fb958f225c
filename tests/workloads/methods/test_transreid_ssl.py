"""TransReID-SSL as its released code defines it (arXiv 2111.12084), and whether it learns."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import webdataset
from torch import Tensor, nn

from tests.learning import encoder_of, pretrained, untrained
from tests.toy import no_load, png
from workloads import assemble
from workloads.data.views import View
from workloads.evaluation.features import extract
from workloads.evaluation.knn import knn_accuracy
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.transreid_ssl import TransReIDSSL, TransReIDSSLConfig
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.vit_ics import ViTICSConfig
from workloads.parts.multi_crop import JITTER
from workloads.record import RunFolder
from workloads.spec import JobSpec, Stream

START = Progress(step=0, epoch=0, total_steps=10)
THAWED = Progress(step=5, epoch=1, total_steps=10)
SMALL = {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 2, "local_size": [8, 4]}


def wave(*shape: int, k: float) -> Tensor:
    return torch.sin(k * torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)).view(shape)


def method_of(encoder: nn.Module | None = None, **config: object) -> TransReIDSSL:
    torch.manual_seed(0)
    encoder = encoder or ViTICSConfig(image_size=(16, 8), patch_size=4, dim=32, depth=2, heads=4).build()
    inputs = Inputs(encoder, DataInfo(8, 2, (3, 16, 8)), no_load, no_load)  # type: ignore[arg-type]
    return TransReIDSSL(TransReIDSSLConfig.model_validate(SMALL | config), inputs)


def batch(n: int = 4) -> dict[str, Tensor]:
    x = torch.randn(n, 3, 16, 8, generator=torch.Generator().manual_seed(1))
    return {"image": x, "other": x.flip(3), "local0": x[:, :, :8, :4], "local1": x[:, :, 8:, 4:]}


def test_the_loss_and_the_centre_are_the_golden_numbers() -> None:
    """2 images, 4 crops, K = 5: 6 pairs."""
    method = method_of(out_dim=5, freeze_last_layer=0)
    method.student_logits = lambda *_, **__: wave(8, 5, k=1.1)  # type: ignore[method-assign]
    method.teacher_logits = lambda *_: wave(4, 5, k=0.6)  # type: ignore[method-assign]
    loss = method(batch(2), START).loss
    assert loss.item() == pytest.approx(8.513079134, rel=1e-6)
    method.after_step(START)
    expected = [0.006483415, 0.003856412, -0.000117747, -0.004050773, -0.006568748]
    assert method.centre.value.tolist() == pytest.approx(expected, abs=1e-8)


def test_a_step_is_dino_with_a_constant_temperature() -> None:
    method, data = method_of(), batch()
    method.centre.value.normal_()
    c = method.centre.value.clone()
    large, small = [data["image"], data["other"]], [data["local0"], data["local1"]]
    t = method.teacher_head(method.teacher(torch.cat(large))).chunk(2)
    s = [x for crops in (large, small) for x in method.head(method.encoder(torch.cat(crops))).chunk(2)]
    for progress in (START, THAWED, Progress(step=95, epoch=19, total_steps=100)):
        pairs = [
            -(F.softmax((t[a] - c) / 0.04, dim=1) * F.log_softmax(s[b] / 0.1, dim=1)).sum(dim=1).mean()
            for a in range(2)
            for b in range(4)
            if a != b
        ]
        assert method(data, progress).loss.item() == pytest.approx(sum(pairs).item() / 6, rel=1e-5)


def test_the_teacher_gets_no_gradient_and_follows_in_its_parameters() -> None:
    method = method_of(momentum=0.75)
    method(batch(), THAWED).loss.backward()
    slow = [*method.teacher.parameters(), *method.teacher_head.parameters()]
    fast = [*method.encoder.parameters(), *method.head.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in slow)
    assert all(p.grad is not None for p in fast)
    with torch.no_grad():
        for p in fast:
            p.add_(torch.randn_like(p))
    old = [p.clone() for p in slow]
    method.after_step(START)
    for p, theirs, ours in zip(slow, fast, old, strict=True):
        assert torch.allclose(p, 0.75 * ours + 0.25 * theirs, atol=1e-6)


def test_batch_norm_of_the_teacher_goes_by_its_batch_and_is_not_copied() -> None:
    method, data = method_of().train(), batch(8)
    method(data, START).loss.backward()
    slow, fast = method.teacher.patch_embed.conv[1].BN, method.encoder.patch_embed.conv[1].BN
    assert slow.training and slow.num_batches_tracked == 1 and fast.num_batches_tracked == 2  # large, then small crops
    maps = method.teacher.patch_embed.conv[0](torch.cat([data["image"], data["other"]]))[:, 32:]
    assert torch.allclose(slow.running_mean, 0.1 * maps.mean(dim=(0, 2, 3)), atol=1e-6)
    before = slow.running_mean.clone(), fast.running_mean.clone()
    assert not torch.allclose(*before, atol=1e-4)
    method.after_step(START)
    assert torch.equal(slow.running_mean, before[0]) and torch.equal(fast.running_mean, before[1])
    g = method.teacher_logits([data["image"], data["other"]])
    assert not torch.allclose(g[:8], method.teacher_logits([data["image"], 9 * data["other"]])[:8], atol=1e-3)


def test_the_last_layer_is_frozen_in_the_first_epoch() -> None:
    for progress, thawed in ((START, False), (THAWED, True)):
        method = method_of()
        method(batch(), progress).loss.backward()
        gradient = method.head.last.weight.grad
        assert gradient is not None and bool(gradient.any()) == thawed


def test_only_the_student_drops_paths() -> None:
    encoder = ViTICSConfig(image_size=(16, 8), patch_size=4, dim=32, depth=2, heads=4, drop_path_rate=0.5).build()
    method = method_of(encoder).train()
    assert [block.drop_path for block in method.encoder.blocks] == [0, 0.5]
    assert [block.drop_path for block in method.teacher.blocks] == [0, 0]


def test_views_are_those_of_the_code() -> None:
    """Two crops of 256 x 128 and eight of 128 x 64, whose shapes before the resize are 3/4 to 4/3."""
    views = TransReIDSSL.views(TransReIDSSLConfig(), (256, 128))
    names = [f"local{i}" for i in range(8)]
    assert list(views) == ["image", "other", *names]
    assert [views[name].size for name in views] == [(256, 128)] * 2 + [(128, 64)] * 8
    for view in views.values():
        assert view.crop_ratio == (3 / 4, 4 / 3) and (view.flip, view.interpolation) == (0.5, "bicubic")
        assert view.photometry.jitter == (0.4, 0.4, 0.2, 0.1)
        assert (view.photometry.jitter_p, view.photometry.gray_p) == (0.8, 0.2)
        assert (view.mean, view.std) == (View(size=1).mean, View(size=1).std)
    drawn = {
        name: (view.crop_scale, view.photometry.blur_p, view.photometry.solarize_p) for name, view in views.items()
    }
    assert drawn["image"] == ((0.4, 1.0), 1.0, 0.0)
    assert drawn["other"] == ((0.4, 1.0), 0.1, 0.2)
    assert all(drawn[name] == ((0.05, 0.4), 0.5, 0.0) for name in names)


def test_local_crops_that_patches_do_not_fill_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got local_size=\(10, 4\) for patches of 4, expected a multiple; use \[8, 4\]"
    ):
        method_of(local_size=[10, 4])


def test_networks_of_convolutions_have_no_tokens_to_choose_from() -> None:
    method = method_of(ResNetCifar(8))
    assert method(batch(), START).loss.isfinite()
    assert list(method.eval().pictures(batch())) == ["image"]


def test_what_is_exported_is_the_cls_token_of_the_teacher() -> None:
    method, images = method_of().eval(), batch()["image"]
    with torch.no_grad():
        method.encoder.norm.weight.zero_()
    assert method.export() is method.teacher
    assert torch.equal(method.export()(images), method.teacher.forward_features(images)[:, 0])
    drawn = method.pictures({"image": images})
    assert drawn["attention"].shape == images.shape
    patches = drawn["attention"][:, 0].unfold(1, 4, 4).unfold(2, 4, 4)
    assert (patches.amax(dim=(3, 4)) == patches.amin(dim=(3, 4))).all(), "4 rows of 2 patches"


PEOPLE = 12


def write_people(folder: Path, split: str, each: int, seed: int) -> str:
    """People of three coloured bands (hair, coat, trousers) before a grey wall, in light of some colour."""
    colours = np.random.default_rng(7).uniform(30, 225, (PEOPLE, 3, 3))
    rng = np.random.default_rng(seed)
    with webdataset.TarWriter(str(folder / f"{split}-000000.tar"), mtime=0) as writer:
        for i in range(PEOPLE * each):
            person = i % PEOPLE
            image = np.full((32, 16, 3), 128.0)
            top, left = rng.integers(1, 5), rng.integers(1, 6)
            ends = top + np.array([0, 6, 16, 26]) + rng.integers(-1, 2, 4)
            for band in range(3):
                image[ends[band] : ends[band + 1], left : left + 9] = colours[person, band]
            image = image * rng.uniform(0.6, 1.3, 3) + rng.normal(0, 20, image.shape)
            pixels = image.clip(0, 255).astype(np.uint8)
            writer.write({"__key__": f"{split}{i:04d}", "png": png(pixels), "cls": str(person).encode()})
    (folder / "classes.txt").write_text("\n".join(f"person{i}" for i in range(PEOPLE)) + "\n")
    return str(folder / f"{split}-000000.tar")


@pytest.mark.slow
def test_neighbours_are_more_often_of_a_person_than_before(tmp_path: Path) -> None:
    """12 toy people, 384 images, 60 steps: kNN .308 (untrained; its CLS .279) -> .429; entropy 1.4 to 4.7 of 4.85."""
    shards = write_people(tmp_path, "train", 32, seed=0), write_people(tmp_path, "test", 20, seed=1)
    crop = {"photometry": JITTER}
    spec = JobSpec.model_validate(
        {
            "name": "people",
            "method": {
                "name": "transreid_ssl",
                "out_dim": 128,
                "hidden_dim": 64,
                "bottleneck_dim": 32,
                "momentum": 0.95,
                "freeze_last_layer": 0,
                "local_crops": 2,
                "local_size": [16, 8],
                "global_view": {"crop_scale": [0.4, 1.0], **crop},
                "other_view": {"crop_scale": [0.4, 1.0], **crop},
                "local_view": {"crop_scale": [0.1, 0.4], **crop},
            },
            "model": {"name": "vit_ics", "image_size": [32, 16], "patch_size": 8, "dim": 48, "depth": 2, "heads": 4},
            "data": {"train": {"shards": shards[0]}},
            "epochs": 5,
            "batch_size": 32,
            "optimizer": {"lr": 2e-3, "weight_decay": 0.04, "betas": [0.9, 0.999], "clip_parameter_norm": 3.0},
            "schedule": {"warmup_epochs": 0.5, "weight_decay_end": 0.4},
            "checkpoint": {"every_steps": 10000},
        }
    )

    def knn(encoder: nn.Module) -> float:
        manifests = [assemble.open_stream(Stream(shards=part)) for part in shards]
        return knn_accuracy(
            *(extract(encoder.eval(), m, View(size=(32, 16))) for m in manifests), k=20, temperature=0.07
        )

    by_mean, by_cls = untrained(spec), untrained(spec)
    by_cls.pool = "token"  # type: ignore[assignment]
    before = knn(by_mean), knn(by_cls)
    after = knn(encoder_of(pretrained(spec, tmp_path, "people")))
    points = list(RunFolder(tmp_path / "runs" / "people").read_metrics())
    assert all(0.2 < point["teacher_entropy"] < math.log(128) - 0.02 for point in points), points
    assert after > max(before), (before, after)
