"""DINO as its paper and released code define it (arXiv 2104.14294), and whether it learns."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.learning import RealImages, encoder_of, pretrained, untrained
from tests.toy import no_load, random_images
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.dino import DINO, DINOConfig
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.timm_import import timm
from workloads.models.vit import ViT, ViTConfig
from workloads.parts.multi_crop import JITTER
from workloads.record import RunFolder

START = Progress(step=0, epoch=0, total_steps=10)
THAWED = Progress(step=5, epoch=1, total_steps=10)
SMALL = {"out_dim": 12, "hidden_dim": 16, "bottleneck_dim": 8, "local_crops": 2, "local_size": 8}


def dino(encoder: nn.Module | None = None, **config: object) -> DINO:
    torch.manual_seed(0)
    encoder = encoder or ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4).build()
    inputs = Inputs(encoder, DataInfo(8, 2, (3, 16, 16)), no_load, no_load)  # type: ignore[arg-type]
    return DINO(DINOConfig.model_validate(SMALL | config), inputs)


def batch(n: int = 4) -> dict[str, Tensor]:
    images = random_images(n)
    x = images["image"]
    return images | {"other": x.flip(3), "local0": x[:, :, :8, :8], "local1": x[:, :, 8:, 8:]}


def test_a_step_is_algorithm_1() -> None:
    method, data = dino(), batch()
    method.centre.value.normal_()
    c = method.centre.value.clone()
    crops = [data[name] for name in ("image", "other", "local0", "local1")]
    t = [method.teacher_head(method.teacher(x)) for x in crops[:2]]
    s = [method.head(method.encoder(x)) for x in crops]
    pairs = []
    for a in range(2):
        for b in range(4):
            if a != b:
                P = F.softmax((t[a] - c) / 0.04, dim=1)
                pairs.append(-(P * F.log_softmax(s[b] / 0.1, dim=1)).sum(dim=1).mean())
    output = method(data, START)
    assert len(pairs) == 6 and output.loss.item() == pytest.approx(sum(pairs).item() / 6, rel=1e-5)
    assert torch.equal(method.centre.value, c), "a step sees one centre"
    method.after_step(START)
    assert torch.allclose(method.centre.value, 0.9 * c + 0.1 * torch.cat(t).mean(dim=0), atol=1e-6)


def test_metrics_add_up_to_the_loss_and_tell_a_collapse() -> None:
    method = dino()
    output = method(batch(), THAWED)
    h, kl = output.metrics["teacher_entropy"].item(), output.metrics["kl"].item()
    assert 0 < h < math.log(12) and kl > 0
    assert h + kl == pytest.approx(output.loss.item(), rel=1e-6)
    for part in (method.teacher_head, method.head):
        nn.init.ones_(part.last.weight)  # all places win alike
    collapsed = method(batch(), THAWED).metrics
    assert collapsed["teacher_entropy"].item() == pytest.approx(math.log(12), rel=1e-5)
    assert collapsed["kl"].item() == pytest.approx(0, abs=1e-5)


def test_the_teacher_gets_no_gradient_is_not_trained_and_follows() -> None:
    method = dino(momentum=0.75)
    method(batch(), THAWED).loss.backward()
    slow = [*method.teacher.parameters(), *method.teacher_head.parameters()]
    fast = [*method.encoder.parameters(), *method.head.parameters()]
    assert all(p.grad is None and not p.requires_grad for p in slow)
    assert all(p.grad is not None for p in fast)
    trained = {id(p) for group in method.parameter_groups() for p in group["params"]}
    assert trained == {id(p) for p in fast}
    assert all(torch.equal(a, b) for a, b in zip(slow, fast, strict=True))
    with torch.no_grad():
        for p in fast:
            p.add_(1.0)
    old = [p.clone() for p in slow]
    method.after_step(START)
    for p, theirs, ours in zip(slow, fast, old, strict=True):
        assert torch.allclose(p, 0.75 * ours + 0.25 * theirs, atol=1e-6)


def test_the_teacher_follows_ever_more_slowly() -> None:
    """The card of SOLIDER: .996 in the first step, .998 half way; 1 behind the last."""
    method, moves = dino(), []
    slow, fast = method.teacher_head.last.weight, method.head.last.weight
    for step in (0, 5, 10):
        nn.init.zeros_(slow)
        nn.init.ones_(fast)
        method.after_step(Progress(step=step, epoch=0, total_steps=10))
        moves.append(slow.mean().item())
    assert moves == pytest.approx([0.004, 0.002, 0.0], abs=1e-7)


@pytest.mark.parametrize("freeze", [0, 1, 2])
def test_the_last_layer_is_frozen_in_the_first_epochs(freeze: int) -> None:
    for epoch in (0, 1, 2):
        method = dino(freeze_last_layer=freeze)
        method(batch(), Progress(step=5 * epoch, epoch=epoch, total_steps=20)).loss.backward()
        gradient = method.head.last.weight.grad
        assert gradient is not None and bool(gradient.any()) == (epoch >= freeze)
        assert method.head.mlp[0].weight.grad.abs().max() > 0


def test_the_teacher_warms_up() -> None:
    """A teacher that is less sure is of greater entropy: .04 in epoch 0, .07 from epoch 29 on."""
    method, data = dino(), batch()
    entropies = [
        method(data, Progress(step=epoch, epoch=epoch, total_steps=100)).metrics["teacher_entropy"].item()
        for epoch in (0, 15, 29, 60)
    ]
    assert entropies[0] < entropies[1] < entropies[2] == entropies[3]


def test_student_sees_all_crops_by_size_the_teacher_the_large_ones() -> None:
    method, seen = dino(), []
    for name in ("encoder", "teacher"):
        network = method.get_submodule(name)
        network.register_forward_hook(lambda _, x, out, name=name: seen.append((name, *x[0].shape, out.requires_grad)))
    method(batch(), START)
    assert seen == [
        ("teacher", 8, 3, 16, 16, False),
        ("encoder", 8, 3, 16, 16, True),
        ("encoder", 8, 3, 8, 8, True),
    ]


def test_only_the_student_drops_paths() -> None:
    encoder = ViT(ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4), drop_path=0.5)
    method = dino(encoder).train()
    crops = [batch(16)["image"]] * 2
    assert torch.equal(method.teacher_logits(crops), method.teacher_logits(crops))
    assert not torch.equal(method.student_logits(crops, frozen=False), method.student_logits(crops, frozen=False))


def test_batch_norm_of_the_teacher_goes_by_its_batch() -> None:
    """What BatchNorm remembers is the teacher's own: the student's is not copied."""
    method = dino(ResNetCifar(8), head_batch_norm=True).train()
    data = batch(8)
    method(data, START).loss.backward()
    slow, fast = method.teacher_head.mlp[1], method.head.mlp[1]
    before = slow.running_mean.clone()
    assert before.any() and not torch.equal(before, fast.running_mean)
    method.after_step(START)
    assert torch.equal(slow.running_mean, before)
    g = method.teacher_logits([data["image"], data["other"]])
    assert not torch.allclose(g[:8], method.teacher_logits([data["image"], 9 * data["other"]])[:8], atol=1e-3)


def test_the_last_bias_of_a_vit_is_frozen_before_batch_norm_only() -> None:
    assert dino().encoder.norm.bias.requires_grad
    method, data = dino(head_batch_norm=True), batch(8)
    assert not method.encoder.norm.bias.requires_grad
    before = method(data, START).loss.item()
    nn.init.normal_(method.encoder.norm.bias)
    assert method(data, START).loss.item() == pytest.approx(before, rel=1e-3)


def test_views_are_two_large_and_ten_small() -> None:
    """Section 3.2: BYOL's colours, two crops of 224 and ten of 96, resized bicubically."""
    views = DINO.views(DINOConfig(), 224)
    names = [f"local{i}" for i in range(10)]
    assert list(views) == ["image", "other", *names]
    assert [views[name].size for name in views] == [224] * 2 + [96] * 10
    assert all(view.photometry.jitter == (0.4, 0.4, 0.2, 0.1) for view in views.values())
    assert all((view.flip, view.interpolation) == (0.5, "bicubic") for view in views.values())
    drawn = {
        name: (view.crop_scale, view.photometry.blur_p, view.photometry.solarize_p) for name, view in views.items()
    }
    assert drawn["image"] == ((0.4, 1.0), 1.0, 0.0)
    assert drawn["other"] == ((0.4, 1.0), 0.1, 0.2)
    assert all(drawn[name] == ((0.05, 0.4), 0.5, 0.0) for name in names)


def test_without_local_crops_two_views_are_enough() -> None:
    method = dino(local_crops=0)
    assert list(DINO.views(method.config, 16)) == ["image", "other"]
    loss = method({name: x for name, x in batch().items() if not name.startswith("local")}, START).loss
    assert loss.item() > 0


def test_networks_that_cannot_look_at_local_crops_are_refused() -> None:
    with pytest.raises(ValueError, match="expected a multiple; use 8"):
        dino(local_size=10)
    sizes = {"img_size": 16, "patch_size": 4, "depth": 1, "embed_dim": 32, "num_heads": 4, "num_classes": 0}
    with pytest.raises(ValueError, match="dynamic_img_size: true"):
        dino(timm.create_model("vit_tiny_patch16_224", **sizes))
    assert dino(timm.create_model("vit_tiny_patch16_224", **sizes), local_crops=0)
    free = dino(timm.create_model("vit_tiny_patch16_224", **sizes, dynamic_img_size=True))
    assert free(batch(), START).loss.isfinite()


def test_what_is_exported_is_the_cls_token_of_the_teacher() -> None:
    method, images = dino().eval(), batch()["image"]
    with torch.no_grad():
        method.encoder.norm.weight.zero_()
    assert method.export() is method.teacher
    assert torch.equal(method.export()(images), method.teacher.forward_features(images)[:, 0])


def test_pictures_show_where_the_teacher_looks() -> None:
    method, images = dino().eval(), batch()["image"]
    drawn = method.pictures({"image": images})
    assert list(drawn) == ["image", "attention"] and drawn["attention"].shape == images.shape
    assert drawn["attention"].amax(dim=(1, 2, 3)).tolist() == [2.0] * 4 and drawn["attention"].min() > -2
    patches = drawn["attention"][:, 0].unfold(1, 4, 4).unfold(2, 4, 4)
    assert (patches.amax(dim=(3, 4)) == patches.amin(dim=(3, 4))).all()
    assert list(dino(ResNetCifar(8)).eval().pictures({"image": images})) == ["image"]


def tiny(**config: object) -> dict[str, object]:
    """DINO in a size for 32 pixels; no blur, a teacher that keeps up with few steps."""
    large = {"crop_scale": [0.4, 1.0], "photometry": JITTER}
    return {
        "name": "dino",
        "out_dim": 256,
        "hidden_dim": 128,
        "bottleneck_dim": 64,
        "momentum": 0.95,
        "teacher_temperature": 0.04,
        "local_crops": 4,
        "local_size": 16,
        "global_view": large,
        "other_view": large,
        "local_view": {"crop_scale": [0.1, 0.4], "photometry": JITTER},
    } | config


@pytest.mark.slow
def test_centre_and_sharpening_together_prevent_collapse(photographs: RealImages, tmp_path: Path) -> None:
    """Figure 7 on 2,000 images of CIFAR-10: entropy of the teacher and divergence after 62 steps, log K = 5.545.

    Both 5.04, .267; the centre alone ends in all places alike, 5.54, .006; sharpening alone in one, .07, .066.
    """
    points = {}
    ways = {
        "both": {},
        "centre alone": {"teacher_temperature": 0.2, "warmup_teacher_temperature": 0.2},
        "sharpening alone": {"centre_momentum": 1.0},
    }
    for way, changed in ways.items():
        spec = photographs.contrast(tiny(local_crops=2, **changed)).model_copy(update={"epochs": 2})
        pretrained(spec, tmp_path, way)
        points[way] = list(RunFolder(tmp_path / "runs" / way).read_metrics())[-1]
    h = {way: point["teacher_entropy"] for way, point in points.items()}
    kl = {way: point["kl"] for way, point in points.items()}
    assert h["centre alone"] > math.log(256) - 0.02 and kl["centre alone"] < 0.05, points
    assert h["sharpening alone"] < 0.2 and kl["sharpening alone"] < 0.1, points
    assert 1 < h["both"] < math.log(256) - 0.2 and kl["both"] > 0.15, points


@pytest.mark.slow
def test_neighbours_are_more_often_of_a_class_than_before(real_images: RealImages, tmp_path: Path) -> None:
    """On 2,000 images of CIFAR-10 kNN .246 -> .269, probe .306 -> .326.

    Some of it is CLS: pooled so the untrained network has .264 and .310. 186 steps are few for DINO.
    """
    spec = real_images.contrast(tiny())
    after = encoder_of(pretrained(spec, tmp_path, "dino"))
    scores = [(real_images.knn(encoder), real_images.probe(encoder)) for encoder in (untrained(spec), after)]
    assert scores[1][0] > scores[0][0] and scores[1][1] > scores[0][1], scores
