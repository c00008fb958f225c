"""Our ViT is timm's in names and numbers; sizes and positions are checked."""

from __future__ import annotations

import json
from typing import Literal

import pytest
import torch
from pydantic import ValidationError

from workloads import catalog
from workloads.models.encoders import build_encoder, exported, layer_ids, model_config, timm_folder_config
from workloads.models.timm_import import _nms, timm
from workloads.models.vit import ViT, ViTConfig, resize_positions, sincos_2d
from workloads.spec import Named

SMALL = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4)


@pytest.mark.parametrize("num_classes", [0, 5])
def test_same_weights_in_timm_give_the_same_features(num_classes: int) -> None:
    torch.manual_seed(0)
    ours = ViT(SMALL, num_classes=num_classes).eval()
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=num_classes, **config["model_args"]).eval()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 16, 16)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)
    assert torch.allclose(ours.forward_features(images), theirs.forward_features(images), atol=1e-5)


def test_images_that_are_not_square_have_the_same_features_in_timm() -> None:
    torch.manual_seed(0)
    ours = ViTConfig(image_size=(16, 8), patch_size=4, dim=32, depth=2, heads=2).build().eval()
    assert ours.pos_embed.shape == (1, 1 + 8, 32)
    assert torch.equal(sincos_2d(32, (4, 2))[1:].view(4, 2, 32), sincos_2d(32, 4)[1:].view(4, 4, 32)[:, :2])
    args = json.loads(json.dumps(timm_folder_config(ours)))["model_args"]
    theirs = timm.create_model(ours.architecture, num_classes=0, **args).eval()
    theirs.load_state_dict(ours.state_dict())
    for size in [(16, 8), (8, 4)]:
        images = torch.randn(2, 3, *size)
        assert ours(images).shape == (2, 32)
    images = torch.randn(2, 3, 16, 8)
    assert torch.allclose(ours(images), theirs(images), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("vit_tiny", 5.5e6), ("vit_small", 21.7e6), ("vit_base", 85.8e6), ("vit_large", 303.3e6), ("vit_huge", 630.8e6)],
)
def test_published_sizes(name: str, parameters: float) -> None:
    with torch.device("meta"):
        encoder = build_encoder(Named(name=name))
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(parameters, rel=0.01)


def test_a_plain_timm_vit_becomes_ours_and_others_stay() -> None:
    with torch.device("meta"):
        plain = build_encoder(Named(name="vit_tiny_patch16_224", image_size=64))
        resnet = build_encoder(Named(name="resnet18"))
        registers = build_encoder(Named(name="vit_small_patch14_reg4_dinov2", image_size=28))
    assert isinstance(plain, ViT)
    assert plain.config == ViTConfig(image_size=64, patch_size=16, dim=192, depth=12, heads=3)
    assert not isinstance(resnet, ViT)
    assert resnet.num_features == 512
    assert not isinstance(registers, ViT)


def test_unknown_names_answer_the_nearest_of_ours_and_of_timm() -> None:
    with pytest.raises(catalog.UnknownName, match="'vit_base'"):
        model_config(Named(name="vit_bose"))
    with pytest.raises(catalog.UnknownName, match="resnet50"):
        model_config(Named(name="resnet_50"))


@pytest.mark.parametrize(
    ("change", "message"), [({"patch_size": 5}, "expected a multiple; use 15"), ({"dim": 30}, "multiple of 4")]
)
def test_sizes_that_do_not_divide(change: dict[str, int], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ViTConfig.model_validate(SMALL.model_dump() | change)


def test_classifier_keeps_the_encoder_but_its_norm() -> None:
    encoder = ViT(SMALL)
    classifier = encoder.as_classifier(3)
    own = encoder.state_dict()
    for name, value in classifier.state_dict().items():
        if not name.startswith(("fc_norm.", "head.")):
            assert torch.equal(value, own[name]), name
    assert not any(name.startswith("norm.") for name in classifier.state_dict())


def test_layer_ids_of_a_timm_network_grow_with_depth() -> None:
    ids, last = layer_ids(timm.create_model("resnet18", num_classes=4))
    assert ids["conv1.weight"] == 0
    assert ids["layer1.0.conv1.weight"] < ids["layer4.0.conv1.weight"] < ids["fc.weight"] == last


def test_resized_positions_keep_cls_and_are_the_identity_on_the_same_grid() -> None:
    table = torch.randn(1, 17, 8)
    assert resize_positions(table, (4, 4), (4, 4)) is table
    bigger = resize_positions(table, (4, 4), (6, 6))
    assert bigger.shape == (1, 37, 8)
    assert torch.equal(bigger[:, 0], table[:, 0])
    constant = torch.cat([torch.zeros(1, 1, 8), torch.full((1, 16, 8), 3.0)], dim=1)
    assert torch.allclose(resize_positions(constant, (4, 4), (7, 7))[:, 1:], torch.tensor(3.0))


def test_positions_resize_to_grids_that_are_not_square() -> None:
    rows = torch.arange(4.0)[:, None].expand(4, 4).reshape(1, 16, 1)
    wide = resize_positions(torch.cat([torch.zeros(1, 1, 1), rows], dim=1), (4, 4), (2, 8))[0, 1:, 0].view(2, 8)
    assert torch.allclose(wide, wide[:, :1].expand(2, 8), atol=1e-6), "all columns of a row are alike"
    assert wide[0, 0] < 1.5 < wide[1, 0]


def test_images_of_the_own_size_are_embedded_as_ever_and_others_with_resized_positions() -> None:
    torch.manual_seed(0)
    vit, images = ViT(SMALL), torch.randn(2, 3, 16, 16)
    assert torch.equal(vit.embed(images), vit.patch_embed(images) + vit.pos_embed[:, 1:])
    for height, width in [(8, 8), (24, 24), (16, 8)]:
        other = torch.randn(2, 3, height, width)
        positions = resize_positions(vit.pos_embed, (4, 4), (height // 4, width // 4))[:, 1:]
        assert torch.equal(vit.embed(other), vit.patch_embed(other) + positions)
        assert vit(other).shape == (2, 32)
    vit(torch.randn(2, 3, 8, 8)).sum().backward()
    assert vit.pos_embed.grad is not None and (vit.pos_embed.grad.abs().sum(dim=2) > 0).all()


def test_images_that_patches_do_not_fill_are_refused() -> None:
    with pytest.raises(ValueError, match="got images of 10 x 16 pixels for patches of 4"):
        ViT(SMALL)(torch.randn(1, 3, 10, 16))


def test_paths_are_dropped_as_the_model_says_the_more_the_deeper() -> None:
    vit = build_encoder(Named(name="vit", **SMALL.model_dump() | {"drop_path_rate": 0.3}))
    assert isinstance(vit, ViT) and [block.drop_path for block in vit.blocks] == pytest.approx([0.0, 0.3])


def test_drop_path_drops_whole_samples_in_training_only() -> None:
    torch.manual_seed(0)
    model = ViT(SMALL, drop_path=0.9)
    images = torch.randn(8, 3, 16, 16)
    assert not torch.equal(model.train()(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_nms_fallback_keeps_the_best_of_overlapping_boxes() -> None:
    boxes = torch.tensor([[0, 0, 10, 10], [1, 1, 10, 10], [20, 20, 30, 30]], dtype=torch.float)
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.5).tolist() == [1, 2]
    assert _nms(boxes, torch.tensor([0.5, 0.9, 0.1]), 0.95).tolist() == [1, 0, 2]


@pytest.mark.parametrize("pool", ["avg", "token"])
def test_a_probe_is_an_encoder_with_a_head_and_timm_reads_it(pool: Literal["avg", "token"]) -> None:
    torch.manual_seed(0)
    encoder = ViT(SMALL).eval()
    encoder.pool = pool
    probe = encoder.as_classifier(5, fc_norm=False).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(probe.forward_head(probe.forward_features(images), pre_logits=True), encoder(images))
    config = timm_folder_config(probe)
    theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"]).eval()
    theirs.load_state_dict(probe.state_dict())
    assert torch.allclose(probe(images), theirs(images), atol=1e-6)
    named = Named(name="vit", **SMALL.model_dump())
    again = exported(named, 5, config["model_args"]).eval()
    again.load_state_dict(probe.state_dict())
    assert torch.equal(again(images), probe(images))
