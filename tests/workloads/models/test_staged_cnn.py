"""CIFAR ResNets and wide ResNets: published sizes, what they compute, and how timm builds them again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.evaluation.base import without_head
from workloads.inference import Model
from workloads.models.encoders import build_encoder, classifier_of, layer_ids, timm_folder_config
from workloads.models.resnet_cifar import Block, ResNetCifar, ResNetCifarConfig
from workloads.models.timm_import import timm
from workloads.models.wide_resnet import WideResNet, WideResNetConfig
from workloads.parts.feature_maps import residual_blocks, tapped
from workloads.spec import Named

SMALL: list[dict[str, Any]] = [
    {"name": "resnet_cifar", "image_size": 16, "depth": 8},
    {"name": "wide_resnet", "image_size": 16, "depth": 10, "widen_factor": 2},
]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (44, 0.66), (56, 0.85), (110, 1.7)])
def test_published_sizes_of_resnets(depth: int, millions: float) -> None:
    """Table 6 of He et al. 2016."""
    with torch.device("meta"):
        network = ResNetCifar(depth, num_classes=10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.035)


@pytest.mark.parametrize(
    ("depth", "k", "millions"), [(40, 1, 0.6), (40, 2, 2.2), (40, 4, 8.9), (16, 8, 11.0), (28, 10, 36.5)]
)
def test_published_sizes_of_wide_resnets(depth: int, k: int, millions: float) -> None:
    """Table 4 of Zagoruyko and Komodakis 2016."""
    with torch.device("meta"):
        network = WideResNet(depth, k, num_classes=10)
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(millions, abs=0.051)


def test_shortcut_takes_every_second_pixel_and_pads_channels_with_zeros() -> None:
    block = Block(2, 3, stride=2)
    torch.nn.init.zeros_(block.norm2.weight)  # f(x) = 0
    x = torch.rand(1, 2, 4, 4)
    out = block(x)
    assert torch.equal(out[:, :2], x[:, :, ::2, ::2])
    assert out[:, 2].abs().max() == 0


def test_cut_behind_the_relus_a_wide_resnet_is_the_one_of_pre_activation_blocks() -> None:
    torch.manual_seed(0)
    network = WideResNet(16, 1, num_classes=5)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    network.eval()
    stem: Any = network.stem
    x, norm = stem.conv(IMAGES), stem.norm
    for block in residual_blocks(network):
        part: Any = block
        active = F.relu(norm(x))
        residual = part.conv2(F.relu(part.norm1(part.conv1(active))))
        x, norm = residual + (x if part.shortcut is None else part.shortcut(active)), part.norm2
    assert torch.equal(network(IMAGES), network.fc(F.relu(norm(x)).mean(dim=(2, 3))))


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model["name"])
def test_stages_halve_the_resolution_and_no_early_pooling(model: dict[str, Any]) -> None:
    network: Any = build_encoder(Named(**model)).eval()
    with tapped(network) as maps:
        features = network(IMAGES)
    assert [x.shape[-1] for x in maps] == [16, 8, 4]
    assert features.shape == (2, network.num_features)
    assert torch.equal(features, network.forward_head(network.forward_features(IMAGES), pre_logits=True))


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model["name"])
def test_a_classifier_is_the_encoder_under_a_fresh_head(model: dict[str, Any]) -> None:
    encoder: Any = build_encoder(Named(**model)).eval()
    features = encoder(IMAGES)
    classifier: Any = classifier_of(encoder, 5, drop_path=0.0)
    assert classifier(IMAGES).shape == (2, 5) and classifier.num_classes == 5
    assert torch.equal(without_head(classifier)(IMAGES), features)


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model["name"])
def test_layer_ids_grow_with_depth(model: dict[str, Any]) -> None:
    ids, last = layer_ids(classifier_of(build_encoder(Named(**model)), 5, drop_path=0.0))
    stem = next(name for name in ids if name.startswith("stem."))
    assert ids[stem] == 0
    assert ids["layer1.0.conv1.weight"] < ids["layer3.0.conv1.weight"] < ids["fc.weight"] == last


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model["name"])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_builds_the_same_network(model: dict[str, Any], num_classes: int) -> None:
    ours: Any = build_encoder(Named(**model))
    if num_classes:
        ours = classifier_of(ours, num_classes, drop_path=0.0)
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=num_classes, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


@pytest.mark.parametrize("model", SMALL, ids=lambda model: model["name"])
def test_an_artifact_loads_here_in_timm_and_in_the_predictor(model: dict[str, Any], tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact", "classifier", model=model)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(artifact.load_model(folder)(IMAGES), theirs(IMAGES))
    served = Model(folder)
    pixels = [torch.zeros(3, 16, 16, dtype=torch.uint8)]
    assert len(served.features(pixels)[0]) == served.card.num_features == theirs.num_features


def test_depths_that_make_no_three_stages() -> None:
    with pytest.raises(ValidationError, match=r"expected 6n \+ 2; use 20 or 26"):
        ResNetCifarConfig(depth=21)
    with pytest.raises(ValidationError, match=r"expected 6n \+ 4; use 16 or 22"):
        WideResNetConfig(depth=20)
