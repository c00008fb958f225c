"""i-MAE against the golden numbers and checks of its paper's card (arXiv 2210.11470)."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.learning import SMALL_VIT, RealImages, encoder_of, pretrained
from tests.toy import random_images
from workloads import assemble
from workloads.data.keys import sample_keys
from workloads.data.reader import Reader
from workloads.data.transforms.image import normalise
from workloads.data.views import View
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.i_mae import IMAE, IMAEConfig, mixture, partners
from workloads.methods.mae import MAE, MAEConfig
from workloads.models.vit import ViT, ViTConfig
from workloads.parts.frozen import Frozen
from workloads.parts.masking import Mask
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.reconstruction import masked_mse, pixel_target
from workloads.spec import Stream

START = Progress(step=0, epoch=0, total_steps=10)
DECODER = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}


def vit(dim: int = 32, image_size: int = 16, patch_size: int = 4) -> ViT:
    return ViTConfig(image_size=image_size, patch_size=patch_size, dim=dim, depth=2, heads=4).build()


def inputs(encoder: nn.Module, teacher: nn.Module | None = None, num_classes: int = 2) -> Inputs:
    info = DataInfo(num_instances=8, num_classes=num_classes, shape=(3, 16, 16))
    unused: Any = None
    return Inputs(encoder, info, unused, unused, lambda _: Frozen(teacher, View(size=16)))  # type: ignore[arg-type]


def mae(encoder: ViT | None = None, **config: Any) -> MAE:
    torch.manual_seed(1)
    encoder = vit(dim=48) if encoder is None else encoder
    return MAE(MAEConfig.model_validate(DECODER | {"norm_pix": False} | config), inputs(encoder))


def i_mae(*, teacher: nn.Module | None = None, num_classes: int = 2, **config: Any) -> IMAE:
    """A student of width 32; its teacher, if there is one, is of width 48."""
    torch.manual_seed(0)
    known = DECODER | {"teacher": None if teacher is None else "mae"} | config
    return IMAE(IMAEConfig.model_validate(known), inputs(vit(), teacher, num_classes))


def pair(method: IMAE, n: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, Mask]:
    """Images, partners, weights and masks."""
    data = random_images(n)
    one, keys = data["image"], data["key"]
    return one, one[partners(keys)], method.weight(keys), method.mask(keys)


def test_mixture_golden() -> None:
    one, two = (torch.tensor(values)[None, None] for values in ([[0.0, 2], [4, 6]], [[8.0, 0], [0, 8]]))
    mixed = mixture(one, two, torch.tensor([0.3]))
    assert mixed.flatten().tolist() == pytest.approx([5.6, 0.6, 1.2, 7.4])


def test_an_unmixed_image_gives_the_loss_of_mae() -> None:
    method = i_mae(mask_ratio=0.75)
    one, two, _, mask = pair(method)
    plain = mae(vit())
    plain.load_state_dict(method.state_dict())
    reconstruction, distillation = method.loss(one, two, torch.ones(4), mask)
    expected = plain.loss(one, plain.decoder(plain.encode(one, mask), mask), mask.mask)
    assert reconstruction.item() == pytest.approx(expected.item(), rel=1e-6)
    assert distillation.item() == 0


def test_a_teacher_that_is_the_student_has_nothing_to_say_of_equal_images() -> None:
    teacher = mae(vit())
    method = i_mae(teacher=teacher)
    method.load_state_dict(teacher.state_dict())
    one, two, a, mask = pair(method)
    assert method.loss(one, one, a, mask)[1].item() == pytest.approx(0, abs=1e-10)
    assert method.loss(one, two, a, mask)[1].item() > 1e-3


@pytest.mark.parametrize("target", ["subordinate", "dominant", "both"])
def test_the_loss_is_that_of_the_clean_images_that_are_asked_for(target: str) -> None:
    method = i_mae(teacher=mae(), target=target, distillation=2.0)
    data = random_images()
    one, two, a, mask = pair(method)
    latent = method.encode(mixture(one, two, a), mask)
    images = {"subordinate": one, "dominant": two}
    layers = {"subordinate": method.decoder.embed, "dominant": method.decoder.embed}
    if target == "both":
        layers["dominant"] = method.second
    expected = 0.0
    for branch in images if target == "both" else (target,):
        z = layers[branch](latent)
        pred = method.decoder.decode(z, mask)
        expected += masked_mse(pred, patchify(images[branch], 4), mask.mask).item()
        expected += 2 * (z - method.clean_latent(images[branch], mask)).square().mean().item()
    loss = method(data, START).loss
    assert loss is not None and loss.item() == pytest.approx(expected, rel=1e-5)


def test_gradients_stay_in_their_branch_and_out_of_the_teacher() -> None:
    teacher = mae()
    method = i_mae(teacher=teacher, target="both")
    one, two, a, mask = pair(method)
    z = method.separate(method.encode(mixture(one, two, a), mask))
    first = masked_mse(method.decoder.decode(z["subordinate"], mask), patchify(one, 4), mask.mask)
    (of_second,) = torch.autograd.grad(first, [method.second.weight], allow_unused=True)
    assert of_second is None
    loss = method(random_images(), START).loss
    assert loss is not None
    loss.backward()
    assert method.second.weight.grad is not None
    assert all(p.grad is None for p in teacher.parameters())


def test_two_way_loss_does_not_mind_the_order_of_images_and_branches() -> None:
    method = i_mae(teacher=mae(), target="both")
    one, two, a, mask = pair(method)
    state = copy.deepcopy(method.state_dict())
    swapped = dict(state)
    for name in ("weight", "bias"):
        swapped[f"decoder.embed.{name}"] = state[f"second.{name}"]
        swapped[f"second.{name}"] = state[f"decoder.embed.{name}"]
    expected = [term.item() for term in method.loss(one, two, a, mask)]
    method.load_state_dict(swapped)
    assert [term.item() for term in method.loss(two, one, 1 - a, mask)] == pytest.approx(expected, rel=1e-5)


def test_cost_one_student_pass_for_a_mixture_and_half_of_a_teacher_for_each_branch() -> None:
    teacher = mae()
    method = i_mae(teacher=teacher, target="both")
    seen: dict[str, list[int]] = {}
    parts = {
        "student": method.encoder,
        "decoder": method.decoder,
        "teacher": teacher.encoder,
        "its decoder": teacher.decoder,
    }
    for name, part in parts.items():
        tokens = seen.setdefault(name, [])
        for block in part.blocks:
            block.register_forward_pre_hook(lambda _, args, tokens=tokens: tokens.append(args[0].shape[1]))
    method(random_images(), START)
    assert seen == {"student": [9, 9], "decoder": [17, 17], "teacher": [9, 9, 9, 9], "its decoder": []}


def test_teacher_sees_the_clean_image_through_the_mask_of_the_mixture() -> None:
    teacher = mae()
    method = i_mae(teacher=teacher)
    one, _, _, mask = pair(method)
    t = method.clean_latent(one, mask)
    assert t.shape == (4, 9, 16)  # CLS and visible patches, at the decoder's width
    assert torch.equal(t, teacher.decoder.embed(teacher.encode(one, mask)))
    hidden = mask.mask[:, :, None]
    noise = unpatchify(torch.randn(4, 16, 48, generator=torch.Generator().manual_seed(2)) * hidden, 4)
    assert torch.equal(t, method.clean_latent(one + noise, mask))


def test_visible_patches_carry_no_loss_of_reconstruction() -> None:
    method = i_mae()
    one, _, _, mask = pair(method)
    pred = torch.randn(4, 16, 48, requires_grad=True)
    masked_mse(pred, pixel_target(one, 4, norm_pix=False), mask.mask).backward()
    assert pred.grad is not None and pred.grad[mask.mask == 0].abs().max() == 0


def test_partners_are_one_cycle_that_the_keys_draw() -> None:
    keys = sample_keys(0, 0, torch.arange(64))
    found = partners(keys)
    visited, at = set(), 0
    for _ in range(64):
        visited.add(at)
        at = int(found[at])
    assert len(visited) == 64 and at == 0
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    assert torch.equal(keys[order][partners(keys[order])], keys[found][order])  # pairs, whatever the places
    assert not torch.equal(found, partners(sample_keys(0, 1, torch.arange(64))))


@pytest.mark.parametrize("s", [0.0, 0.3, 1.0])
def test_degree_of_semantics_is_the_share_of_pairs_of_one_class(s: float) -> None:
    keys, label = sample_keys(0, 0, torch.arange(1000)), torch.arange(1000) % 10
    found = partners(keys, label, s)
    assert (found != torch.arange(1000)).all()
    share = (label[found] == label).double().mean().item()
    assert share == s if s in (0, 1) else share == pytest.approx(s, abs=0.05)


def test_partners_where_none_is_of_the_wanted_class() -> None:
    keys = sample_keys(0, 0, torch.arange(3))
    each = torch.arange(3)
    assert (partners(keys, each, 1.0) != each).all()  # nobody of the same class: anybody
    assert (partners(keys, torch.zeros(3, dtype=torch.int64), 0.0) != each).all()  # nobody of another
    assert partners(keys[:1], each[:1], 1.0).tolist() == [0]
    unlabelled = torch.tensor([-1, -1, 0])
    assert partners(keys, unlabelled, 0.0).tolist() == partners(keys).tolist()  # without a label: not of one class


def test_weights_are_fixed_or_drawn_below_a_half() -> None:
    keys = sample_keys(0, 0, torch.arange(2000))
    assert i_mae().weight(keys).unique().tolist() == [0.3]
    method = i_mae(a={"beta": 1.0})
    drawn = method.weight(keys)
    assert drawn.min() >= 0 and drawn.max() <= 0.5
    assert drawn.mean().item() == pytest.approx(0.25, abs=0.01)  # Beta(1, 1) is uniform
    assert torch.equal(drawn[5:7], method.weight(keys[5:7]))


def test_share_of_pairs_of_one_class_is_told() -> None:
    assert "same_class" not in i_mae()(random_images(8), START).metrics
    assert i_mae(s=1.0)(random_images(8), START).metrics["same_class"] == 1
    assert i_mae(s=0.0)(random_images(8), START).metrics["same_class"] == 0


def test_teacher_is_no_part_of_the_method() -> None:
    method = i_mae(teacher=mae())
    assert {name.partition(".")[0] for name in method.state_dict()} == {"encoder", "decoder"}
    assert i_mae(target="both").state_dict().keys() - method.state_dict().keys() == {"second.weight", "second.bias"}


def test_pictures_show_the_pair_and_keep_the_visible_patches_of_the_mixture() -> None:
    method = i_mae(target="both").eval()
    data = random_images()
    pictures = method.pictures({name: data[name] for name in ("image", "key")})  # as it is served: no labels
    assert list(pictures)[4:] == ["subordinate_reconstruction", "dominant_reconstruction"]
    kept = 1 - method.mask(data["key"]).mask[:, :, None]
    expected = patchify(0.3 * pictures["original"] + 0.7 * pictures["partner"], 4)
    assert torch.allclose(patchify(pictures["mixture"], 4), expected, atol=1e-6)
    for name in ("masked", "subordinate_reconstruction", "dominant_reconstruction"):
        assert torch.allclose(patchify(pictures[name], 4) * kept, expected * kept, atol=1e-6)
    alone = method.pictures({name: data[name][:1] for name in ("image", "key")})
    assert torch.equal(alone["mixture"], alone["original"])


@pytest.mark.parametrize(
    ("teacher", "words"),
    [
        (vit(), "got a teacher of method ViT, expected one with encoder and decoder"),
        (mae(vit(image_size=32)), "'image_size': 32"),
        (mae(decoder_dim=32), "'decoder_dim': 32"),
    ],
)
def test_a_teacher_of_another_kind_or_size_is_refused(teacher: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        i_mae(teacher=teacher)


def test_semantics_without_labels_are_refused() -> None:
    with pytest.raises(ValueError, match="leave s out"):
        i_mae(s=0.5, num_classes=0)
    with pytest.raises(ValueError, match="one visible patch"):
        i_mae(mask_ratio=0.99)


@pytest.mark.slow
def test_the_subordinate_image_is_found_again(photographs: RealImages, tmp_path: Path) -> None:
    """On held-out mixtures with a = 0.3 its hidden patches are half as far as those of the dominant image.

    Most of that is won by not taking the dominant image for it: after so few steps what is found of the subordinate
    one brings the error only 6 % below that of the mean colour.
    """
    sizes = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4}
    changes: dict[str, Any] = {
        "model": SMALL_VIT | {"dim": 32, "depth": 2},
        "batch_size": 32,
        "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
    }
    pretrained(photographs.job({"name": "mae", "norm_pix": False} | sizes, epochs=1, **changes), tmp_path, "mae")
    job = photographs.job({"name": "i_mae", "teacher": "job:mae"} | sizes, epochs=4, **changes)
    method: Any = assemble.restore_method(pretrained(job, tmp_path, "i-mae"), tmp_path)
    manifest, view = assemble.open_stream(Stream(shards=photographs.test)), View(size=32)
    data = Reader(manifest, {"image": view}, batch_size=256).batch(0)
    one, keys = normalise(data["image"], view), data["key"]
    two, mask = one[partners(keys)], method.mask(keys)
    with torch.no_grad():
        error = method.loss(one, two, method.weight(keys), mask)[0].item()
    clean = patchify(one, 4)
    of_dominant = masked_mse(patchify(two, 4), clean, mask.mask).item()
    of_mean = masked_mse(patchify(one.mean(dim=(0, 2, 3), keepdim=True).expand_as(one), 4), clean, mask.mask).item()
    print(f"subordinate {error:.3f}, dominant {of_dominant:.3f}, mean colour {of_mean:.3f}")
    assert error < 0.55 * of_dominant
    assert error < 0.98 * of_mean


@pytest.mark.slow
def test_it_beats_mae_for_as_long(real_images: RealImages, tmp_path: Path) -> None:
    """3 epochs of i-MAE and of MAE, after a teacher of the student's size that MAE trained for 9.

    2,000 images of CIFAR-10, mean of three seeds, MAE -> i-MAE: probe .279 -> .300, kNN .225 -> .245, each seed better
    in both. A small effect of a short run: an untrained encoder has .292 and .261, the teacher .301 and .246.
    """
    decoder = {"decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4, "mask_ratio": 0.5}
    mae = {"name": "mae", "norm_pix": False} | decoder
    shared = {
        "model": {"name": "vit", "image_size": 32, "patch_size": 8, "dim": 64, "depth": 4, "heads": 4},
        "optimizer": {"lr": 2e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
    }
    pretrained(real_images.job(mae, epochs=9, **shared), tmp_path, "teacher")
    scores = []
    for name, method in (("i-mae", {"name": "i_mae", "teacher": "job:teacher"} | decoder), ("alone", mae)):
        encoder = encoder_of(pretrained(real_images.job(method, epochs=3, **shared), tmp_path, name))
        scores.append((real_images.probe(encoder), real_images.knn(encoder)))
    student, alone = scores
    assert student[0] > alone[0] and student[1] > alone[1], scores
