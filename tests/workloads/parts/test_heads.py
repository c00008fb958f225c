"""Projection heads, and the bias that one of them takes out."""

from __future__ import annotations

import torch
from torch import nn

from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.vit import ViTConfig
from workloads.parts.heads import Tower, freeze_absorbed_bias, mlp, normed_mlp


def test_linear_layers_with_relu_between() -> None:
    head = mlp(6, 8, 4)
    assert [type(part) for part in head] == [nn.Linear, nn.ReLU, nn.Linear]
    assert head(torch.randn(2, 6)).shape == (2, 4) and head[0].bias is not None


def test_each_with_batch_norm_and_none_with_a_bias() -> None:
    head = normed_mlp(6, 8, 8, 4)
    assert [type(part) for part in head] == ([nn.Linear, nn.BatchNorm1d, nn.ReLU] * 3)[:-1]
    assert head(torch.randn(3, 6)).shape == (3, 4)
    assert all(part.bias is None for part in head if isinstance(part, nn.Linear))


def test_the_absorbed_bias_means_nothing_behind_batch_norm() -> None:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=16, patch_size=4, dim=8, depth=1, heads=2).build()
    freeze_absorbed_bias(encoder)
    assert [name for name, p in encoder.named_parameters() if not p.requires_grad] == ["norm.bias"]
    head, images = normed_mlp(8, 8, 4), torch.randn(6, 3, 16, 16)
    before = head(encoder(images))
    nn.init.normal_(encoder.norm.bias)
    assert torch.allclose(head(encoder(images)), before, atol=1e-4)


def test_other_networks_stay_as_they_are() -> None:
    network = ResNetCifar(8)
    freeze_absorbed_bias(network)
    assert all(p.requires_grad for p in network.parameters())


def test_a_tower_gives_projections_of_unit_length_in_float32() -> None:
    tower, images = Tower(ResNetCifar(8), mlp(64, 4)).double(), torch.randn(3, 3, 16, 16).double()
    found = tower(images)
    assert found.dtype == torch.float32 and torch.allclose(found.norm(dim=1), torch.ones(3))
    x = tower.projector(tower.encoder(images)).float()
    assert torch.allclose(found, x / x.norm(dim=1, keepdim=True), atol=1e-6)
