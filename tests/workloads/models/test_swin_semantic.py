"""Swin with a semantic controller: where lambda acts, what is timm's, and how timm builds it again."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor, nn

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.models.encoders import build_encoder, classifier_of, layer_ids
from workloads.models.swin_semantic import (
    Block,
    Controller,
    SwinSemantic,
    SwinSemanticConfig,
    SwinTransformer,
    SwinTransformerBlock,
)
from workloads.models.timm_import import timm
from workloads.parts.feature_maps import dense_features
from workloads.parts.tokens import patch_tokens
from workloads.spec import Named
from workloads.weights import load_initial

TINY: dict[str, Any] = {
    "name": "swin_semantic",
    "image_size": [16, 8],
    "patch_size": 2,
    "embed_dim": 8,
    "depths": [1, 2, 1],
    "num_heads": [2, 2, 2],
    "window_size": 2,
    "drop_path_rate": 0,
}
IMAGES = torch.randn(2, 3, 16, 8, generator=torch.Generator().manual_seed(0))


def tiny(**fields: Any) -> SwinSemantic:
    torch.manual_seed(0)
    network: Any = build_encoder(Named(**(TINY | fields))).eval()
    return network


def weights(*values: float) -> Tensor:
    return torch.tensor(values)


def test_golden_of_the_controller() -> None:
    """The card of SOLIDER: logits [0, 1] of the scale, shift [.5, -.5]; a controller of zeros scales by softplus(0)."""
    controller = Controller(2, 0.0)
    nn.init.zeros_(controller.scale.weight)
    nn.init.zeros_(controller.shift.weight)
    x = torch.ones(1, 3, 2, 2)
    assert torch.allclose(controller(x), torch.tensor(0.693147))
    controller.scale.bias.data = torch.tensor([0.0, 1.0])
    controller.shift.bias.data = torch.tensor([0.5, -0.5])
    assert torch.allclose(controller(x), torch.tensor([1.193147, 0.813262]).expand(1, 3, 2, 2), atol=1e-6)


def test_the_controller_is_told_lambda_and_its_rest_to_1() -> None:
    controller = Controller(1, 0.25)
    nn.init.zeros_(controller.scale.weight)
    controller.shift.weight.data = torch.tensor([[3.0, -5.0]])
    x = torch.zeros(3, 1, 1, 1)
    assert controller(x, weights(1, 0, 0.5)).flatten().tolist() == [3, -5, -1]
    assert controller(x).flatten().tolist() == [-3] * 3, "the default, 3 / 4 - 15 / 4"


def test_lambda_acts_behind_the_merging_of_patches_and_not_behind_the_last_stage() -> None:
    network = tiny()
    lam = weights(1, 0.3)
    x = network.layers[0](network.patch_embed(IMAGES))
    for stage in network.layers[1:]:
        x = stage.downsample(x)
        s = torch.stack([lam, 1 - lam], dim=1)
        scale, shift = stage.controller.scale, stage.controller.shift
        gain = torch.log1p((s @ scale.weight.T + scale.bias).exp())
        x = x * gain[:, None, None] + (s @ shift.weight.T + shift.bias)[:, None, None]
        x = stage.blocks(x)
    assert torch.allclose(network.forward_features(IMAGES, lam), network.norm(x), atol=1e-5)
    assert torch.allclose(network(IMAGES, lam), network.norm(x).mean(dim=(1, 2)), atol=1e-5)


def test_lambda_is_of_each_image_and_has_a_default_that_can_be_changed() -> None:
    network = tiny(semantic_weight=0.7)
    both = network(IMAGES, weights(0, 1))
    assert torch.allclose(both[:1], network(IMAGES[:1], weights(0)), atol=1e-6)
    assert torch.allclose(both[1:], network(IMAGES[1:], weights(1)), atol=1e-6)
    assert not torch.allclose(both, network(IMAGES, weights(1, 0)), atol=1e-4)
    assert network.semantic_weight == 0.7 and torch.equal(network(IMAGES), network(IMAGES, weights(0.7, 0.7)))
    network.semantic_weight = 0.2
    assert network.semantic_weight == 0.2 and torch.equal(network(IMAGES), network(IMAGES, weights(0.2, 0.2)))


def test_each_pair_that_is_built_changes_the_features() -> None:
    """Of four stages three have a pair; the fourth of the released code changes nothing."""
    network = tiny(depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
    pairs = [module for module in network.modules() if isinstance(module, Controller)]
    assert [pair.scale.out_features for pair in pairs] == [16, 32, 64]
    before = network(IMAGES)
    for pair in pairs:
        for layer in (pair.scale, pair.shift):
            old = layer.weight.data.clone()
            nn.init.normal_(layer.weight)
            assert not torch.allclose(network(IMAGES), before, atol=1e-4)
            layer.weight.data = old


@pytest.mark.parametrize(("size", "window"), [((16, 8), 2), ((16, 16), 2), ((32, 16), 4)])
def test_without_modulation_it_is_timms(size: tuple[int, int], window: int) -> None:
    """Where all maps are cut into whole windows."""
    network = tiny(image_size=size, window_size=window)
    for stage in network.layers[1:]:
        for layer in (stage.controller.scale, stage.controller.shift):
            nn.init.zeros_(layer.weight)
        nn.init.constant_(stage.controller.scale.bias, math.log(math.e - 1))  # softplus: 1
    args = {name: value for name, value in network.manta_args.items() if name != "semantic_weight"}
    plain = SwinTransformer(**args, num_classes=0, always_partition=True, strict_img_size=False).eval()
    names = [name for name in network.state_dict() if "controller" not in name]
    plain.load_state_dict({name: network.state_dict()[name] for name in names})
    images = torch.randn(2, 3, *size)
    assert torch.allclose(network(images), plain(images), atol=1e-5)


def test_the_top_of_an_image_does_not_see_its_bottom() -> None:
    """Windows of 4 shifted by 2 over 5 rows: 0 to 1 and 2 to 4 are apart. timm's fill comes behind the shift."""
    torch.manual_seed(0)
    args = {"dim": 8, "input_resolution": (5, 4), "num_heads": 2, "window_size": 4, "shift_size": 2}
    block = SwinTransformerBlock(**args, always_partition=True, dynamic_mask=True)
    x = torch.randn(1, 5, 4, 8)
    other = x.clone()
    other[:, 0] = torch.randn(4, 8)

    def moved() -> list[bool]:
        return [not torch.allclose(a, b, atol=1e-6) for a, b in zip(block(x)[0], block(other)[0], strict=True)]

    assert moved()[4], "timm has changed: the class below may not be needed any more"
    block.__class__ = Block
    assert moved() == [True, True, False, False, False]


@pytest.mark.parametrize("size", ["tiny", "small", "base"])
def test_published_sizes(size: str) -> None:
    name = f"swin_{size}_patch4_window7_224"
    with torch.device("meta"):
        network = SwinSemanticConfig(architecture=name).build()  # type: ignore[arg-type]
        plain = timm.create_model(name, num_classes=0)
    own = sum(p.numel() for n, p in network.named_parameters() if "controller" in n)
    C = plain.embed_dim
    assert own == 2 * 3 * (2 + 4 + 8) * C, "two layers of 3 C"
    assert sum(p.numel() for p in network.parameters()) == own + sum(p.numel() for p in plain.parameters())
    assert network.num_features == 8 * C


def test_maps_and_tokens_are_those_of_any_encoder() -> None:
    network = tiny()
    maps, pooled = dense_features(network, IMAGES)
    assert maps.shape == (2, 32, 2, 1) and torch.equal(pooled, network(IMAGES))
    assert torch.equal(patch_tokens(network, IMAGES), maps.flatten(2).mT)
    assert torch.allclose(network.norm(patch_tokens(network, IMAGES, norm=False)), maps.flatten(2).mT, atol=1e-6)
    assert network(torch.randn(1, 3, 12, 6)).shape == (1, 32), "images of any size"


def test_a_controller_is_as_deep_as_the_start_of_its_stage() -> None:
    ids, last = layer_ids(classifier_of(tiny(), 5))
    assert len(ids) == len(list(classifier_of(tiny(), 5).parameters()))
    for i in (1, 2):
        assert ids[f"layers.{i}.controller.scale.weight"] == ids[f"layers.{i}.downsample.reduction.weight"] < last


class Nothing(nn.Module):
    """In the place of a method that takes a ViT only."""

    def __init__(self, *_: object) -> None:
        super().__init__()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_timm_builds_it_again_with_any_lambda(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.toy_artifact.MAE", Nothing)
    folder = write_artifact(tmp_path / "artifact", kind, model=TINY | {"semantic_weight": 0.2})
    ours: Any = artifact.load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert theirs.semantic_weight == 0.2 and torch.allclose(ours(IMAGES), theirs(IMAGES), atol=1e-6)
    other = timm.create_model(f"local-dir:{folder}", pretrained=True, semantic_weight=0.9).eval()
    assert torch.allclose(other(IMAGES), ours(IMAGES, weights(0.9, 0.9)), atol=1e-6)
    assert not torch.allclose(other(IMAGES), ours(IMAGES), atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"semantic_weight": 1.5}, "less than or equal to 1"),
        ({"architecture": "swin_huge"}, "swin_base_patch4_window7_224"),
        ({"image_size": [17, 8]}, r"got image_size=\[17, 8\] for patch_size=2, expected \[16, 8\]"),
        ({"depths": [1, 1]}, r"depths=\[1, 1\] and num_heads=\[2, 2, 2\], expected a number for each of 2 or more"),
        ({"depths": [2], "num_heads": [2]}, "2 or more stages"),
        ({"num_heads": [2, 3, 2]}, r"of which \[3\] do not divide embed_dim=8"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields: dict[str, Any], message: str) -> None:
    config = {name: value for name, value in (TINY | fields).items() if name != "name"}
    with pytest.raises(ValidationError, match=message):
        SwinSemanticConfig.model_validate(config)


def test_it_starts_from_a_plain_swin(tmp_path: Path) -> None:
    """The controller is fresh, all else is timm's."""
    sizes = {name: TINY[name] for name in ("patch_size", "embed_dim", "depths", "num_heads", "window_size")}
    torch.manual_seed(1)
    plain = SwinTransformer(img_size=(16, 8), num_classes=0, always_partition=True, strict_img_size=False, **sizes)
    save_file(plain.state_dict(), tmp_path / "swin.safetensors")
    network = tiny()
    notes = load_initial(network, str(tmp_path / "swin.safetensors"), tmp_path)
    assert any("controller" in note and "fresh" in note for note in notes)
    own = network.state_dict()
    assert all(torch.equal(own[name], value) for name, value in plain.state_dict().items())
