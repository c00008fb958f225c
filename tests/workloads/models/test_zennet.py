"""Networks of structure strings: what they compute, and what they offer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from workloads.models.encoders import build_encoder, classifier_of, layer_ids, timm_folder_config
from workloads.models.structure import parameters, parse
from workloads.models.timm_import import timm
from workloads.models.zennet import SE, Chain, ZenNet, ZenNetConfig, published
from workloads.spec import Named

SMALL = (
    "SuperConvK3BNRELU(3,8,2,1)SuperResK3K3(8,16,2,8,2)SuperResK1K3K1(16,24,1,8,1)SuperResIDWE2K5(24,16,2,16,1)"
    "SuperConvK1BNRELU(16,32,1,1)"
)


@pytest.mark.parametrize("name", ["imagenet-0.1ms", "imagenet-400M", "cifar-1M"])
def test_parameters_are_those_that_are_counted(name: str) -> None:
    """But for the BatchNorms, which count once rather than twice, those of shortcuts, and the classifier's biases."""
    structure = parse(published()[name]["structure"])
    with torch.device("meta"):
        network = ZenNet(structure, num_classes=10)
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    chains = [module for module in network.modules() if isinstance(module, Chain)]
    shortcuts = [chain.shortcut[1] for chain in chains if isinstance(chain.shortcut, nn.Sequential)]
    twice = sum(norm.num_features for norm in norms) + sum(norm.num_features for norm in shortcuts)  # type: ignore[misc]
    assert sum(p.numel() for p in network.parameters()) == parameters(structure, 10) + twice + 9


def test_residual_blocks_start_as_their_shortcut() -> None:
    torch.manual_seed(0)
    network = ZenNet(SMALL)
    for part in network.parts[1:4]:
        x = torch.randn(2, part[0].branch[0].in_channels, 8, 8)  # type: ignore[union-attr, index]
        for chain in part:  # type: ignore[union-attr]
            assert torch.equal(chain(x), chain.shortcut(x).relu())
            x = chain(x)
    assert {module.eps for module in network.modules() if isinstance(module, nn.BatchNorm2d)} == {1e-3}
    weights = network.parts[1][0].branch[0].weight  # type: ignore[index, union-attr]
    assert float(weights.detach().std()) == pytest.approx(3.26 * (2 / (9 * 16)) ** 0.5, rel=0.1)  # type: ignore[operator]


def test_it_is_an_encoder_a_classifier_and_timms() -> None:
    encoder: Any = build_encoder(Named(name="zennet", structure=SMALL, image_size=32))
    images = torch.randn(2, 3, 32, 32)
    assert encoder.eval()(images).shape == (2, encoder.num_features) == (2, 32)
    assert encoder.forward_features(images).shape == (2, 32, 4, 4)
    ours: Any = classifier_of(encoder, 5)
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images), theirs.eval()(images))
    ids, last = layer_ids(ours)
    assert ids["parts.0.0.branch.0.weight"] == 0 < ids["parts.1.0.branch.0.weight"] < last == ids["fc.weight"]


def test_squeeze_and_excitation_is_behind_each_spatial_convolution_of_the_body() -> None:
    network = ZenNet(SMALL, se=True)
    found = [module for module in network.modules() if isinstance(module, SE)]
    assert [module.weigh[1].in_channels for module in found] == [8, 8, 8, 8, 32, 32]
    x = torch.rand(2, 8, 4, 4)
    with torch.no_grad():
        assert ((found[0](x) / x - found[0].weigh(x)).abs() < 1e-5).all()
    assert network(torch.randn(2, 3, 32, 32)).shape == (2, 32)


def test_names_of_the_paper_and_wrong_ones() -> None:
    assert len(published()) == 12
    assert ZenNetConfig(structure="cifar-1M").image_size == 32
    assert ZenNetConfig(structure="cifar-1M", image_size=64).image_size == 64
    with pytest.raises(
        ValidationError, match=r"got structure 'cifar-3M', expected a structure string or one of cifar-0.5M, cifar-1M"
    ):
        ZenNetConfig(structure="cifar-3M")
    for structure, said in {
        "SuperConvK4BNRELU(3,8,1,1)": "'SuperConvK4BNRELU' at character 0",
        "SuperConvK3BNRELU(5,8,1,1)": "which sees images, expected 3 channels",
    }.items():
        with pytest.raises(ValidationError, match=said) as caught:
            ZenNetConfig(structure=structure)
        assert [error["loc"] for error in caught.value.errors()] == [("structure",)]
    others: list[Any] = [[], {}, 3, None]
    for other in others:
        with pytest.raises(ValidationError, match="valid string"):
            ZenNetConfig(structure=other)
    with pytest.raises(ValidationError, match="at most 100000 characters"):
        ZenNetConfig(structure="SuperConvK3BNRELU(3,3,1,1)" * 4000)
