"""MAE against the golden numbers and checks of its paper's card (arXiv 2111.06377)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from tests.learning import RealImages, encoder_of, losses, pretrained, untrained
from tests.toy import no_load, random_images
from workloads.data.keys import sample_keys, uniform
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.mae import MAE, MAEConfig
from workloads.models.vit import ViTConfig, sincos_2d
from workloads.parts.masking import Mask, random_masking
from workloads.parts.patches import normalise_patches, patchify, unpatchify
from workloads.parts.schedules import warmup_cosine

START = Progress(step=0, epoch=0, total_steps=10)


def mae(image_size: int = 16, patch_size: int = 4, **config: object) -> MAE:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=image_size, patch_size=patch_size, dim=32, depth=2, heads=4).build()
    info = DataInfo(num_instances=8, num_classes=2, shape=(3, image_size, image_size))
    defaults = {"decoder_dim": 16, "decoder_depth": 1, "decoder_heads": 2}
    return MAE(MAEConfig.model_validate(defaults | config), Inputs(encoder, info, no_load, no_load))  # type: ignore[arg-type]


@pytest.fixture
def arange() -> torch.Tensor:
    return torch.arange(48.0).reshape(1, 3, 4, 4)


def test_patchify_is_channel_last_inside_a_patch(arange: torch.Tensor) -> None:
    patches = patchify(arange, 2)
    assert patches[0, 0].tolist() == [0, 16, 32, 1, 17, 33, 4, 20, 36, 5, 21, 37]
    assert patches[0, 3].tolist() == [10, 26, 42, 11, 27, 43, 14, 30, 46, 15, 31, 47]
    assert torch.equal(unpatchify(patches, 2), arange)


def test_masking_golden() -> None:
    mask = random_masking(torch.tensor([[0.7, 0.1, 0.9, 0.3]]), 0.75)
    assert mask.ids_keep.tolist() == [[1]]
    assert mask.ids_restore.tolist() == [[2, 0, 3, 1]]
    assert mask.mask.tolist() == [[1, 0, 1, 1]]


def test_normalised_target_is_unbiased_with_eps_in_the_root(arange: torch.Tensor) -> None:
    target = normalise_patches(patchify(arange, 2))
    assert target[0, 0, :3].tolist() == pytest.approx([-1.339251, -0.180980, 0.977291], abs=1e-6)


@pytest.mark.parametrize(("patch_size", "expected"), [(2, 11 / 12), (16, 767 / 768)])
def test_loss_of_a_zero_prediction_with_normalised_target(patch_size: int, expected: float) -> None:
    size = patch_size * 2
    method = mae(size, patch_size, norm_pix=True)
    image = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    loss = method.loss(image, torch.zeros(1, 4, 3 * patch_size**2), torch.tensor([[1.0, 0, 1, 1]]))
    assert loss.item() == pytest.approx(expected, abs=1e-5)


def test_loss_of_a_zero_prediction_with_raw_target(arange: torch.Tensor) -> None:
    loss = mae(4, 2, norm_pix=False).loss(arange, torch.zeros(1, 4, 12), torch.tensor([[1.0, 0, 1, 1]]))
    assert loss.item() == pytest.approx(793.833313, abs=1e-4)


@pytest.mark.parametrize(("image_size", "patch_size", "ratio", "tokens"), [(224, 16, 0.75, 50), (16, 4, 0.5, 9)])
def test_encoder_sees_only_visible_tokens(image_size: int, patch_size: int, ratio: float, tokens: int) -> None:
    method = mae(image_size, patch_size, mask_ratio=ratio)
    seen: list[int] = []
    for block in method.encoder.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    method(random_images(1, image_size), START)
    assert seen == [tokens, tokens]


def test_no_gradient_to_predictions_of_kept_patches() -> None:
    method, data = mae(), random_images()
    mask = method.mask(data["key"])
    pred = torch.randn(4, 16, 48, requires_grad=True)
    method.loss(data["image"], pred, mask.mask).backward()
    assert pred.grad is not None
    assert pred.grad[mask.mask == 0].abs().max() == 0
    assert (pred.grad[mask.mask == 1].abs().amax(dim=1) > 0).all()


def test_removed_pixels_do_not_reach_the_encoder_and_kept_ones_not_the_target() -> None:
    method, data = mae(norm_pix=False), random_images(1)
    mask = method.mask(data["key"])
    patches = patchify(data["image"], 4)
    noise = torch.randn(patches.shape, generator=torch.Generator().manual_seed(2))
    hidden = mask.mask[:, :, None]
    other_removed = unpatchify(patches + noise * hidden, 4)
    other_kept = unpatchify(patches + noise * (1 - hidden), 4)
    assert torch.equal(method.encode(data["image"], mask), method.encode(other_removed, mask))
    pred = torch.zeros(1, 16, 48)
    assert torch.equal(method.loss(data["image"], pred, mask.mask), method.loss(other_kept, pred, mask.mask))


def test_sincos_encodes_the_column_first() -> None:
    table = sincos_2d(8, 2)
    assert table[0].tolist() == [0] * 8
    assert table[2].tolist() == pytest.approx([0.841471, 0.01, 0.540302, 0.99995, 0, 0, 1, 1], abs=1e-5)
    assert table[3].tolist() == pytest.approx([0, 0, 1, 1, 0.841471, 0.01, 0.540302, 0.99995], abs=1e-5)


@pytest.mark.parametrize(("epoch", "rate"), [(0, 0.0), (20, 0.5), (40, 1.0), (420, 0.5), (800, 0.0)])
def test_learning_rate_golden(epoch: float, rate: float) -> None:
    assert warmup_cosine(epoch, warmup=40, total=800, base=1) == pytest.approx(rate, abs=1e-12)


def test_positions_are_fixed_and_tokens_decay() -> None:
    method = mae()
    decay, no_decay = method.parameter_groups()
    named = {id(p): name for name, p in method.named_parameters()}
    decayed = {named[id(p)] for p in decay["params"]}
    assert {"decoder.mask_token", "encoder.cls_token"} <= decayed
    assert all(named[id(p)].endswith("bias") or "norm" in named[id(p)] for p in no_decay["params"])
    assert no_decay["weight_decay"] == 0
    trained = decayed | {named[id(p)] for p in no_decay["params"]}
    assert "encoder.pos_embed" not in trained
    assert "decoder.pos_embed" not in named.values()


def test_mask_belongs_to_the_sample_not_to_the_batch() -> None:
    method, data = mae(), random_images(8)
    whole = method.mask(data["key"])
    parts = [method.mask(keys) for keys in data["key"].split(2)]
    assert torch.equal(whole.mask, torch.cat([part.mask for part in parts]))
    another_epoch = method.mask(sample_keys(0, 1, data["index"]))
    assert not torch.equal(whole.mask, another_epoch.mask)


def test_pictures_keep_the_visible_patches() -> None:
    method, data = mae().eval(), random_images(2)
    pictures = method.pictures(data)
    mask = method.mask(data["key"]).mask[:, :, None]
    kept = patchify(pictures["reconstruction"], 4) * (1 - mask)
    assert torch.allclose(kept, patchify(data["image"], 4) * (1 - mask))
    assert not torch.allclose(pictures["reconstruction"], data["image"])


def test_a_network_without_tokens_is_refused() -> None:
    info = DataInfo(num_instances=8, num_classes=2, shape=(3, 16, 16))
    with pytest.raises(ValueError, match="got model Linear, expected a ViT"):
        MAE(MAEConfig(), Inputs(nn.Linear(2, 2), info, no_load, no_load))  # type: ignore[arg-type]


def test_a_ratio_that_hides_everything_is_refused() -> None:
    with pytest.raises(ValueError, match="one visible patch at least"):
        mae(mask_ratio=0.99)


def test_positions_belong_to_patches_wherever_they_stand() -> None:
    """They are added before tokens are dropped: visible tokens in another order are the same tokens in that order."""
    method, data = mae().eval(), random_images(2)
    mask = method.mask(data["key"])
    order = torch.tensor([2, 0, 3, 1])
    there = method.encode(data["image"], mask)
    here = method.encode(data["image"], mask._replace(ids_keep=mask.ids_keep[:, order]))
    assert torch.allclose(there[:, 0], here[:, 0], atol=1e-5)
    assert torch.allclose(there[:, 1:][:, order], here[:, 1:], atol=1e-5)
    everything = torch.arange(16).expand(2, -1)
    whole = method.encode(data["image"], Mask(everything, everything, torch.zeros(2, 16)))
    assert torch.allclose(whole, method.encoder.forward_features(data["image"]), atol=1e-5)


def test_masks_are_drawn_in_full_precision() -> None:
    """Noise of half precision has ties among 4,096 patches."""
    keys = sample_keys(0, 0, torch.arange(8))
    method = mae(256, 4)
    with torch.autocast("cpu", torch.bfloat16):
        inside = method.mask(keys)
    assert torch.equal(inside.mask, method.mask(keys).mask)
    assert inside.mask.sum(dim=1).tolist() == [4096 * 0.75] * 8
    noise = uniform(keys, 4096, salt="mae.mask")
    assert noise.dtype == torch.float64 and all(len(row.unique()) == 4096 for row in noise)


def test_defaults_are_the_papers() -> None:
    config = MAEConfig()
    assert config.mask_ratio == 0.75 and config.norm_pix
    view = MAE.views(config, 224)["image"]
    assert (view.crop_scale, view.flip, view.photometry) == ((0.2, 1.0), 0.5, None)


def test_the_encoder_stays_and_the_decoder_goes() -> None:
    method = mae()
    exported = method.export()
    assert exported is method.encoder
    assert not any("decoder" in name or "mask_token" in name for name in exported.state_dict())


@pytest.mark.slow
def test_it_learns_on_real_images(real_images: RealImages, tmp_path: Path) -> None:
    """The masked error of normalised pixels falls below 0.8 (a prediction of 0 has 47/48), and the probe gains."""
    spec = real_images.job(
        {"name": "mae", "decoder_dim": 32, "decoder_depth": 1, "decoder_heads": 4},
        epochs=6,
        batch_size=32,
        optimizer={"lr": 2e-3, "weight_decay": 0.05, "betas": [0.9, 0.95]},
    )
    encoder = encoder_of(pretrained(spec, tmp_path, "mae"))
    curve = losses(tmp_path, "mae")
    assert curve[0] > 0.95 and curve[-1] < 0.8
    assert real_images.probe(encoder) > real_images.probe(untrained(spec)) + 0.015
