"""MimCo against the golden numbers and checks of its paper's card (arXiv 2209.03063), and whether it learns."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from tests.learning import SMALL_VIT, RealImages, encoder_of, pretrained
from tests.toy import random_images
from workloads.data.keys import sample_keys
from workloads.data.views import View
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.mimco import MimCo, MimCoConfig
from workloads.methods.moco_v3 import JITTER
from workloads.models.vit import ViTConfig
from workloads.parts.frozen import Frozen
from workloads.parts.patches import patchify, unpatchify

START = Progress(step=0, epoch=0, total_steps=10)
INFO = DataInfo(num_instances=8, num_classes=2, shape=(3, 16, 16))
TEACHER = ViTConfig(image_size=16, patch_size=4, dim=24, depth=1, heads=2)  # narrower than the student


def no_build(config: dict[str, object]) -> None:
    raise AssertionError(config)


def mimco(teacher: nn.Module | None = None, **config: object) -> MimCo:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4).build()
    frozen = Frozen(TEACHER.build() if teacher is None else teacher, View(size=16))
    validated = MimCoConfig.model_validate({"teacher": "moco@1", "head_dim": 16} | config)
    return MimCo(validated, Inputs(encoder, INFO, {"moco@1": frozen}.__getitem__, no_build))  # type: ignore[arg-type]


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(("pairs", "expected"), [(2, 0.006715), (4, 0.020012)])
def test_losses_of_orthonormal_features_golden(pairs: int, expected: float) -> None:
    method, orthonormal = mimco(), torch.eye(pairs, 24)
    patches = orthonormal.expand(3, -1, -1)
    assert method.patch_loss(patches, patches, torch.ones(3, pairs)).item() == pytest.approx(expected, abs=1e-6)
    assert method.image_loss(orthonormal, orthonormal).item() == pytest.approx(expected, abs=1e-6)


def test_losses_of_equal_features_are_a_guess_among_all() -> None:
    method, equal = mimco(), torch.ones(2, 4, 24)
    assert method.patch_loss(equal, equal, torch.ones(2, 4)).item() == pytest.approx(1.386294, abs=1e-6)
    assert method.image_loss(equal[0], equal[0]).item() == pytest.approx(1.386294, abs=1e-6)


def test_a_perfect_student_loses_nothing_at_low_temperature_and_position_matters() -> None:
    method, t = mimco(temperature=1e-3), features(2, 16, 24)
    mask = method.mask(random_images(2)["key"])
    assert method.patch_loss(t, t, mask).item() < 1e-6
    assert method.patch_loss(t, t.roll(1, dims=1), mask).item() > 100


def test_lengths_of_features_do_not_matter() -> None:
    method, mask = mimco(), mimco().mask(random_images(2)["key"])
    p, t = features(2, 2, 16, 24)
    patch, image = method.patch_loss(p, t, mask).item(), method.image_loss(p[0], t[0]).item()
    for a, b in ((5.0, 1.0), (1.0, 0.3)):
        assert method.patch_loss(a * p, b * t, mask).item() == pytest.approx(patch, abs=1e-5)
        assert method.image_loss(a * p[0], b * t[0]).item() == pytest.approx(image, abs=1e-5)


def test_visible_patches_are_candidates_but_not_asked() -> None:
    method, data = mimco(), random_images()
    mask = method.mask(data["key"])
    p, t = features(2, 4, 16, 24)
    p.requires_grad_()
    loss = method.patch_loss(p, t, mask)
    loss.backward()
    assert p.grad is not None
    assert p.grad[mask == 0].abs().max() == 0
    assert (p.grad[mask == 1].abs().amax(dim=1) > 0).all()
    other_visible = torch.where(mask[:, :, None] == 0, -t, t)
    assert method.patch_loss(p, other_visible, mask).item() != pytest.approx(loss.item(), abs=1e-3)


def test_the_teacher_learns_nothing_and_belongs_to_nobody() -> None:
    method, data = mimco().train(), random_images()
    before = [p.clone() for p in method.teacher.module.parameters()]
    loss = method(data, START).loss
    loss.backward()
    teacher = method.teacher.module
    assert not teacher.training
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())
    assert all(torch.equal(p, old) for p, old in zip(teacher.parameters(), before, strict=True))
    assert not {id(p) for p in teacher.parameters()} & {id(p) for p in method.parameters()}
    assert not any("teacher" in name for name in method.state_dict())
    assert all(p.grad is not None for p in method.parameters() if p.requires_grad)


def test_the_teacher_sees_the_whole_image_and_the_student_nothing_of_what_is_hidden() -> None:
    method, data = mimco(), random_images(2)
    images, mask = data["image"], method.mask(data["key"])
    hidden = mask[:, :, None]
    patches = patchify(images, 4)
    other = unpatchify(patches + features(*patches.shape) * hidden, 4)
    for ours, theirs in zip(method.student(images, mask), method.student(other, mask), strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(method.targets(images), method.targets(other), strict=True):
        assert not torch.allclose(ours, theirs)
    seen: list[Tensor] = []
    method.teacher.module.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    method(data, START)
    assert len(seen) == 1 and torch.equal(seen[0], images)  # the very crop, once


def test_both_encode_all_patches_once_and_the_teacher_keeps_nothing_for_gradients() -> None:
    method = mimco()
    seen: list[tuple[str, int, bool]] = []
    for name, network in (("student", method.encoder), ("teacher", method.teacher.module)):
        network.norm.register_forward_hook(lambda _, __, x, name=name: seen.append((name, x.shape[1], x.requires_grad)))
    method(random_images(), START)
    assert sorted(seen) == [("student", 17, True), ("teacher", 17, False)]


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_what_an_image_is_like_is_pooled_as_the_teacher_does(pool: Literal["token", "avg"]) -> None:
    teacher, images = TEACHER.build(), random_images(2)["image"]
    teacher.pool = pool
    method = mimco(teacher)
    tokens = teacher.forward_features(images)
    t, t_bar = method.targets(images)
    assert torch.equal(t, tokens[:, 1:])
    assert torch.equal(t_bar, tokens[:, 0] if pool == "token" else tokens[:, 1:].mean(dim=1))
    p, g = method.student(images, torch.zeros(2, 16))
    ours = method.encoder.forward_features(images)
    assert torch.allclose(p, method.patch_head(ours[:, 1:]))
    assert torch.allclose(g, method.image_head(method.export()(images)))
    assert method.encoder.pool == pool


def test_loss_is_that_of_patches_and_alpha_that_of_images() -> None:
    data = random_images()
    output = mimco(alpha=0.5)(data, START)
    patch, image = (output.metrics[name].item() for name in ("patch_loss", "image_loss"))
    assert output.loss.item() == pytest.approx(patch + 0.5 * image, abs=1e-6)


def test_a_teacher_of_larger_patches_sees_a_larger_image() -> None:
    teacher = ViTConfig(image_size=32, patch_size=8, dim=24, depth=1, heads=2).build()
    t, t_bar = mimco(teacher).targets(random_images(2)["image"])
    assert t.shape == (2, 16, 24) and t_bar.shape == (2, 24)


def test_a_share_of_the_patches_is_hidden_by_sample() -> None:
    method, data = mimco(), random_images(8)
    whole = method.mask(data["key"])
    assert whole.sum(dim=1).tolist() == [10] * 8  # int(16 * 0.4) stay
    assert torch.equal(whole, torch.cat([method.mask(keys) for keys in data["key"].split(2)]))
    assert not torch.equal(whole, method.mask(sample_keys(0, 1, data["index"])))


def test_pictures_of_a_perfect_student_are_the_original(monkeypatch: pytest.MonkeyPatch) -> None:
    method, data = mimco().eval(), random_images(2)
    pictures = method.pictures(data)
    visible = 1 - method.mask(data["key"])[:, :, None]
    for name in ("masked", "matched"):
        assert torch.equal(patchify(pictures[name], 4) * visible, patchify(data["image"], 4) * visible)
    assert not torch.equal(pictures["matched"], data["image"])
    monkeypatch.setattr(method, "student", lambda images, _: method.targets(images))
    assert torch.equal(method.pictures(data)["matched"], data["image"])


def test_a_teacher_that_does_not_fit_is_refused() -> None:
    coarse = ViTConfig(image_size=16, patch_size=8, dim=24, depth=1, heads=2).build()
    with pytest.raises(ValueError, match="got a teacher of 2 x 2 patches for a student of 4 x 4"):
        mimco(coarse)
    with pytest.raises(ValueError, match="expected one that cuts images into patches"):
        mimco(nn.Conv2d(3, 24, 4))


@pytest.mark.slow
def test_neighbours_are_more_often_of_a_class_than_after_mae(real_images: RealImages, tmp_path: Path) -> None:
    """With a teacher trained by contrast, the student against the same network trained by MAE for as many steps."""
    common = {
        "model": SMALL_VIT | {"patch_size": 8, "depth": 2},
        "epochs": 4,
        "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
    }
    view = {"crop_scale": [0.2, 1.0], "photometry": JITTER}
    methods: dict[str, dict[str, object]] = {
        "moco_v3": {"dim": 64, "mlp_dim": 256, "momentum": 0.9, "view": view, "other_view": view},
        "mimco": {"teacher": "job:moco_v3", "head_dim": 128},
        "mae": {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 2},
    }
    accuracy = {}
    for name, config in methods.items():
        folder = pretrained(real_images.job({"name": name} | config, **common), tmp_path, name)
        accuracy[name] = real_images.knn(encoder_of(folder))
    assert accuracy["mimco"] > accuracy["mae"], accuracy
