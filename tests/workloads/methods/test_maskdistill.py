"""MaskDistill against the golden numbers and checks of its paper's card (arXiv 2210.10615)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.learning import SMALL_VIT, RealImages, encoder_of, losses, pretrained
from tests.toy import random_images
from workloads.data.keys import sample_keys
from workloads.data.views import View
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.maskdistill import MaskDistill, MaskDistillConfig, normalise
from workloads.models.encoders import build_encoder
from workloads.models.timm_import import timm
from workloads.models.vit import ViTConfig
from workloads.parts.frozen import Frozen
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.reconstruction import hide
from workloads.spec import Named

START = Progress(step=0, epoch=0, total_steps=10)
BEIT: dict[str, Any] = {
    "name": "beit_base_patch16_224",
    "image_size": 16,
    "patch_size": 4,
    "options": {
        **{"embed_dim": 32, "depth": 2, "num_heads": 4, "init_values": 0.1, "drop_path_rate": 0.1},
        **{"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_fc_norm": False},
    },
}


def vit(**changes: int) -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 4, "dim": 32, "depth": 2, "heads": 4}
    return ViTConfig.model_validate(sizes | changes).build()


def maskdistill(encoder: nn.Module | None = None, teacher: nn.Module | None = None, **config: Any) -> MaskDistill:
    torch.manual_seed(0)
    frozen = Frozen(teacher or vit(dim=24, depth=3, heads=2), View(size=16))
    encoder = encoder or vit()
    size = encoder.config.image_size if hasattr(encoder, "config") else 16
    info = DataInfo(num_instances=8, num_classes=2, shape=(3, size, size))  # type: ignore[arg-type]
    inputs = Inputs(encoder, info, load=lambda _: frozen, build=None)  # type: ignore[arg-type]
    document = {"teacher": "clip", "min_block": 1} | config
    return MaskDistill(MaskDistillConfig.model_validate(document), inputs)


def test_target_is_normalised_by_the_biased_variance_of_a_token() -> None:
    target = normalise(torch.tensor([1.0, 2, 3, 4]))
    assert target.tolist() == pytest.approx([-1.341635, -0.447212, 0.447212, 1.341635], abs=1e-6)
    unbiased = target * (3 / 4) ** 0.5
    assert unbiased.tolist() == pytest.approx([-1.161895, -0.387298, 0.387298, 1.161895], abs=1e-5)
    assert normalise(torch.full((2, 3, 8), 5.0)).abs().max() == 0
    assert normalise(torch.rand(2, 3, 8).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(("d", "expected"), [(0.5, 0.125), (-0.5, 0.125), (2, 1.5), (1, 0.5)])
def test_smooth_l1(d: float, expected: float) -> None:
    o, f = torch.zeros(1, 2, 4), torch.full((1, 2, 4), d)
    assert maskdistill().loss(o, f, torch.tensor([[1.0, 0]])).item() == pytest.approx(expected)


def test_loss_of_a_zero_prediction() -> None:
    f = normalise(torch.tensor([[[1.0, 2, 3, 4], [9, 9, 9, 9]]]))
    loss = maskdistill().loss(torch.zeros(1, 2, 4), f, torch.tensor([[1.0, 0]]))
    assert loss.item() == pytest.approx(0.470817, abs=1e-6)


def test_loss_is_the_mean_over_all_hidden_patches_of_the_batch() -> None:
    """Their number varies from sample to sample; each patch weighs the same."""
    f = torch.tensor([[[0.5], [9], [9]], [[2], [2], [2]]])
    mask = torch.tensor([[1.0, 0, 0], [1, 1, 1]])
    assert maskdistill().loss(torch.zeros_like(f), f, mask).item() == pytest.approx((0.125 + 3 * 1.5) / 4)


def test_beta_is_where_the_loss_turns_linear() -> None:
    mask, o, f = torch.ones(1, 1), torch.zeros(1, 1, 1), torch.full((1, 1, 1), 3.0)
    assert maskdistill(beta=2.0).loss(o, f, mask).item() == pytest.approx(3 - 0.5 * 2)
    assert maskdistill(beta=4.0).loss(o, f, mask).item() == pytest.approx(0.5 * 9 / 4)


def test_scale_and_offset_of_the_teacher_do_not_matter() -> None:
    method, data = maskdistill(), random_images()
    target, loss = method.target(data["image"]), method(data, START).loss
    method.teacher.module.blocks[-1].register_forward_hook(lambda _, __, out: 3 * out + 2)  # type: ignore[union-attr, index]
    assert torch.allclose(method.target(data["image"]), target, atol=1e-3)
    assert method(data, START).loss.item() == pytest.approx(loss.item(), rel=1e-3)


def test_no_gradient_to_predictions_of_visible_patches_nor_to_the_teacher() -> None:
    method, data = maskdistill(), random_images()
    mask = method.mask(data["key"])
    o = torch.randn(4, 16, 24, requires_grad=True)
    method.loss(o, method.target(data["image"]), mask).backward()
    assert o.grad is not None
    assert o.grad[mask == 0].abs().max() == 0
    assert (o.grad[mask == 1].abs().amax(dim=1) > 0).all()

    method(data, START).loss.backward()
    assert all(parameter.grad is None for parameter in method.teacher.module.parameters())
    assert all(parameter.grad is not None for parameter in method.parameters())


def beit() -> nn.Module:
    return build_encoder(Named.model_validate(BEIT))


def pooled_by_attention() -> nn.Module:
    """A ViT of timm without CLS."""
    sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 4, "num_classes": 0}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **sizes, class_token=False, global_pool="map")
    return model


@pytest.mark.parametrize("encoder", [vit, beit, pooled_by_attention])
def test_hidden_pixels_reach_the_teacher_but_not_the_student(encoder: Any) -> None:
    method, data = maskdistill(encoder()).eval(), random_images(2)
    images, mask = data["image"], method.mask(data["key"])
    other = unpatchify(patchify(images, 4) + mask[:, :, None], 4)
    assert torch.equal(method.predict(images, mask), method.predict(other, mask))
    assert not torch.allclose(method.target(images), method.target(other))


def test_block_masks_of_the_paper() -> None:
    """78 of 196 patches in blocks of 16 and more: never more of them, sometimes a few less."""
    method = maskdistill(vit(image_size=224, patch_size=16), vit(image_size=224, patch_size=16), min_block=16)
    masks = method.mask(sample_keys(0, 0, torch.arange(500)))
    counts = masks.sum(dim=1)
    assert counts.max() == 78
    assert counts.mean().item() == pytest.approx(77.5, abs=0.4)
    assert (counts == 78).float().mean().item() == pytest.approx(2 / 3, abs=0.1)
    # where rectangles lie, nearly every patch is in a hidden 2 x 2 square; at random a third of them would be
    grid = masks.view(500, 1, 14, 14)
    squares = -nn.functional.max_pool2d(-grid, 2, stride=1)  # 1 where all four are hidden
    covered = nn.functional.max_pool2d(nn.functional.pad(squares, (1, 1, 1, 1)), 2, stride=1)
    assert covered.sum() / grid.sum() > 0.9


def test_mask_belongs_to_the_sample_not_to_the_batch() -> None:
    method, data = maskdistill(), random_images(8)
    whole = method.mask(data["key"])
    assert torch.equal(whole, torch.cat([method.mask(keys) for keys in data["key"].split(2)]))
    assert not torch.equal(whole, method.mask(sample_keys(0, 1, data["index"])))


def test_cost_of_a_step_is_one_pass_of_each() -> None:
    """The student reads mask tokens with the others (no shorter sequence); the teacher stops before its norm."""
    method, data = maskdistill(), random_images()
    seen: dict[str, list[tuple[int, ...]]] = {"student": [], "teacher": []}
    teacher: Any = method.teacher.module
    for name, network in (("student", method.encoder), ("teacher", teacher)):
        for block in network.blocks:  # type: ignore[union-attr]
            block.register_forward_pre_hook(lambda _, args, name=name: seen[name].append(tuple(args[0].shape)))
    teacher.norm.register_forward_pre_hook(lambda *_: pytest.fail("tokens are taken before the norm"))
    method(data, START)
    assert seen == {"student": 2 * [(4, 17, 32)], "teacher": 3 * [(4, 17, 24)]}


def test_a_teacher_with_larger_patches_sees_a_larger_image() -> None:
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2, "num_classes": 0}
    teacher = timm.create_model("vit_tiny_patch16_224", **sizes, dynamic_img_size=True)
    bigger = maskdistill(vit(image_size=32), teacher)  # 8 x 8 patches: 64 pixels for this teacher
    seen: list[int] = []
    teacher.patch_embed.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[-1]))
    assert bigger.target(torch.randn(2, 3, 32, 32)).shape == (2, 64, 24)
    assert seen == [64]


def test_target_is_of_the_image_as_the_teacher_knows_it() -> None:
    torch.manual_seed(0)
    teacher = vit()
    half = Frozen(teacher, View(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    info = DataInfo(num_instances=8, num_classes=2, shape=(3, 16, 16))
    config = MaskDistillConfig(teacher="clip", min_block=1)
    method = MaskDistill(config, Inputs(vit(), info, load=lambda _: half, build=None))  # type: ignore[arg-type]
    pixels, student = torch.rand(2, 3, 16, 16), View(size=16)
    images = (pixels - torch.tensor(student.mean)[:, None, None]) / torch.tensor(student.std)[:, None, None]
    tokens = teacher.embed(2 * pixels - 1)  # type: ignore[operator]
    *_, last = teacher.layers(tokens)  # type: ignore[operator]
    assert torch.allclose(method.target(images), normalise(last[:, 1:]), atol=1e-4)


@pytest.mark.parametrize("encoder", [beit, pooled_by_attention])
def test_all_that_is_trained_gets_a_gradient(encoder: Any) -> None:
    """Other students than ours; what pools tokens is not trained, since the loss does not reach it."""
    method = maskdistill(encoder()).train()
    method(random_images(), START).loss.backward()
    idle = {name for name, p in method.named_parameters() if p.grad is None}
    assert idle == {name for name, p in method.named_parameters() if not p.requires_grad}
    assert all(name.startswith("encoder.attn_pool.") for name in idle)


def test_positions_and_tokens_of_the_paper_s_student_do_not_decay() -> None:
    method = maskdistill(beit())
    named = {id(p): name for name, p in method.named_parameters()}
    kept = {
        named[id(p)] for group in method.parameter_groups() if group["weight_decay"] == 0.0 for p in group["params"]
    }
    assert {"mask_token", "encoder.cls_token", "encoder.rel_pos_bias.relative_position_bias_table"} <= kept
    assert {"encoder.blocks.0.gamma_1", "head.bias"} <= kept
    assert not any(name.endswith(("qkv.weight", "head.weight")) for name in kept)


def test_a_norm_behind_the_pooling_is_not_trained() -> None:
    method = maskdistill(
        build_encoder(Named.model_validate(BEIT | {"options": BEIT["options"] | {"use_fc_norm": True}}))
    )
    frozen = {name for name, p in method.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.fc_norm.weight", "encoder.fc_norm.bias"}


def test_pictures() -> None:
    method, data = maskdistill().eval(), random_images(2)
    pictures = method.pictures(data)
    assert list(pictures) == ["original", "masked", "target", "prediction"]
    assert all(picture.shape == data["image"].shape for picture in pictures.values())
    mask = method.mask(data["key"])
    assert torch.allclose(hide(pictures["target"], mask, 4), hide(pictures["prediction"], mask, 4))
    assert not torch.allclose(pictures["target"], pictures["prediction"])
    alone = method.pictures({name: value[:1] for name, value in data.items()})
    assert torch.allclose(alone["prediction"], pictures["prediction"][:1], atol=1e-3)


def test_it_builds_on_the_meta_device() -> None:
    with torch.device("meta"):
        assert maskdistill().head.weight.shape == (24, 32)


@pytest.mark.parametrize(
    ("networks", "config", "words"),
    [
        ({}, {"min_block": 16}, r"got min_block=16 where mask_ratio=0.4 hides 6 of 16 patches.*use at most 6"),
        ({}, {"mask_ratio": 0.01}, "hides 0 of 16 patches"),
        ({"teacher": "vit8"}, {}, r"got a teacher with 2 x 2 patches for a student with 4 x 4"),
        ({"teacher": "resnet"}, {}, "got model ResNet, expected one that cuts images into patches"),
        ({"encoder": "resnet"}, {}, "got model ResNet, expected one that cuts images into patches"),
        ({"encoder": "swin"}, {}, "got SwinTransformer, which merges its patches of 4 pixels to 8"),
        ({"teacher": "swin"}, {}, "got SwinTransformer, which merges its patches of 4 pixels to 8"),
    ],
)
def test_what_does_not_fit_is_refused(networks: dict[str, str], config: dict[str, Any], words: str) -> None:
    def build(name: str) -> Any:
        if name == "vit8":
            return vit(patch_size=8)
        if name == "resnet":
            return timm.create_model("test_resnet", num_classes=0)
        sizes = {"img_size": 16, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "window_size": 2}
        return timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes)

    with pytest.raises(ValueError, match=words):
        maskdistill(**{role: build(name) for role, name in networks.items()}, **config)


@pytest.mark.slow
def test_a_student_of_a_teacher_that_knows_classes_beats_one_of_pixels(photographs: RealImages, tmp_path: Path) -> None:
    """As many epochs each: hidden features of a supervised ViT are worth more to k-NN than hidden pixels.

    On 2,000 images of CIFAR-10 after 4 epochs: distilled .294, pixels .255, untrained .246; the teacher itself .307.
    """
    fields: dict[str, Any] = {
        "model": SMALL_VIT | {"patch_size": 8, "depth": 2},
        "optimizer": {"lr": 3e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
    }
    crop = {"crop_scale": [0.6, 1.0]}
    teach = {"name": "fine_tune", "layer_decay": 1.0, "drop_path": 0.0, "view": crop}
    pretrained(photographs.job(teach, epochs=6, **fields), tmp_path, "teacher")

    def knn(method: dict[str, Any], name: str) -> float:
        return photographs.knn(encoder_of(pretrained(photographs.job(method, epochs=4, **fields), tmp_path, name)))

    view = crop | {"photometry": {}}
    distilled = knn({"name": "maskdistill", "teacher": "job:teacher", "min_block": 2, "view": view}, "student")
    decoder = {"decoder_dim": 64, "decoder_depth": 1, "decoder_heads": 4}
    pixels = knn({"name": "mae", **decoder, "view": crop}, "pixels")
    assert distilled > pixels + 0.02
    assert losses(tmp_path, "student")[-1] < 0.8 * losses(tmp_path, "student")[0]
