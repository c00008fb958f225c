"""GENet by the numbers of its released code (arXiv 2006.14090)."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from workloads.catalog import problems_of
from workloads.models.encoders import build_encoder, classifier_of, layer_ids, model_config, timm_folder_config
from workloads.models.genet import Block, GENet, GENetConfig, Layer
from workloads.models.timm_import import timm
from workloads.spec import Named

PUBLISHED = ["genet_light", "genet_normal", "genet_large"]


def published(name: str, num_classes: int = 1000) -> Any:
    return classifier_of(build_encoder(Named(name=name)), num_classes)


def uniform(shape: tuple[int, ...]) -> Tensor:
    """The fill rule of the golden numbers: mean 0, deviation 1, by the place in the tensor."""
    i = torch.arange(math.prod(shape))
    k = (7 * i * i + 13 * i + 5) % 10007
    return ((k.double() / 10007 - 0.5) * math.sqrt(12)).reshape(shape)


@pytest.mark.parametrize(
    ("name", "parameters", "multiply_adds"),
    [
        ("genet_light", 8_173_761, 547_222_656),
        ("genet_normal", 21_142_920, 2_208_073_216),
        ("genet_large", 31_078_280, 4_557_041_664),
    ],
)
def test_published_sizes(name: str, parameters: int, multiply_adds: int) -> None:
    size = model_config(Named(name=name)).image_size  # type: ignore[attr-defined]
    with torch.device("meta"):
        network = published(name)
        assert sum(p.numel() for p in network.parameters()) == parameters
        with FlopCounterMode(display=False) as counter:
            network(torch.empty(1, 3, size, size))
    assert counter.get_total_flops() == 2 * multiply_adds


@pytest.mark.parametrize(
    ("name", "logits", "first"),
    [
        ("genet_light", [-147.173181, 2.945383, -263.493029, -86.572113], 688),
        ("genet_normal", [-90.302510, 56.358800, -8.715188, 13.132695], 775),
        ("genet_large", [-379.828291, 376.807297, -275.382100, 112.112285], 806),
    ],
)
def test_logits_are_those_of_the_released_code(name: str, logits: list[float], first: int) -> None:
    network = published(name).double().eval()
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, nn.Conv2d):
                fan_in = math.prod(module.weight.shape[1:])
                module.weight.copy_(uniform(tuple(module.weight.shape)) * math.sqrt(2 / fan_in))
            elif isinstance(module, nn.Linear):
                module.weight.copy_(uniform(tuple(module.weight.shape)) / math.sqrt(module.in_features))
                nn.init.zeros_(module.bias)
        found = network(uniform((1, 3, 64, 64)))[0]
    assert found[:4].tolist() == pytest.approx(logits, abs=1e-5)
    assert int(found.argmax()) == first
    if name == "genet_light":
        assert float(found.abs().mean()) == pytest.approx(86.878431, abs=1e-5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_each_part_halves_the_resolution_but_the_last_two(name: str) -> None:
    with torch.device("meta"):
        network = published(name, 0)
        x = network.stem(torch.empty(1, 3, 64, 64))
        sizes = [x.shape[-1]]
        for block in network.blocks:
            x = block(x)
            sizes.append(x.shape[-1])
        sizes.append(network.last(x).shape[-1])
    assert sizes == [32, 16, 8, 4, 2, 2, 2]


def test_layers() -> None:
    """Channels inside go by those that a layer gives, in its first layer too; the shortcut is strided, not pooled."""
    layer = Layer("BL", 24, 40, 2, 5)
    convs = [module for module in layer.branch.modules() if isinstance(module, nn.Conv2d)]
    assert [(c.in_channels, c.out_channels, c.kernel_size[0], c.stride[0]) for c in convs] == [
        (24, 10, 1, 1),
        (10, 10, 5, 2),
        (10, 40, 1, 1),
    ]
    shortcut: Any = layer.shortcut
    assert (shortcut[0].kernel_size, shortcut[0].stride, shortcut[0].bias) == ((1, 1), (2, 2), None)
    assert isinstance(Layer("DW", 8, 8, 1, 3).shortcut, nn.Identity)
    assert Layer("DW", 8, 8, 1, 3).branch[2][0].groups == 24  # type: ignore[index, union-attr]
    x = -torch.ones(2, 8, 4, 4)
    assert layer(torch.randn(2, 24, 8, 8)).shape == (2, 40, 4, 4) and (Layer("XX", 8, 8, 1, 3)(x) >= 0).all()


SMALL = {"stem": 5, "blocks": [["XX", 8, 1, 2], ["BL", 16, 2, 2, 5], ["DW", 12, 1, 1]], "last": 20}


def test_others_of_its_blocks_are_encoders_classifiers_and_timms() -> None:
    encoder: Any = build_encoder(Named(name="genet", image_size=32, **SMALL))
    images = torch.randn(2, 3, 32, 32)
    features = encoder.eval()(images)
    assert features.shape == (2, encoder.num_features) == (2, 20)
    assert encoder.forward_features(images).shape == (2, 20, 4, 4)
    ours: Any = classifier_of(encoder, 5)
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images), theirs.eval()(images))
    ids, last = layer_ids(ours)
    assert ids["stem.0.weight"] == 0 and ids["fc.weight"] == last
    assert ids["blocks.1.0.branch.0.0.weight"] < ids["blocks.1.1.branch.0.0.weight"] < last


@pytest.mark.parametrize(
    "changed", [{"blocks": []}, {"blocks": [["XY", 8, 1, 2]]}, {"blocks": [["XX", 8, 1, 3]]}, {"stem": 0}]
)
def test_a_wrong_table_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        GENetConfig.model_validate(SMALL | changed)


@pytest.mark.parametrize(
    ("block", "said"),
    [
        (["XX", 8, 1, 3], "(stride: Input should be 1 or 2)"),
        (["XX", 8], "(layers: Field required; stride: Field required)"),
        (["XX", 10**9, 1000, 1], "(channels: Input should be less than or equal to 99999; layers: "),
        (["XX", 8, 1, 2, 3, 4], "at most 5 items"),
        (3, "Input should be a tuple"),
    ],
)
def test_a_wrong_block_is_told_once_with_what_a_block_is(block: object, said: str) -> None:
    with pytest.raises(ValidationError) as caught:
        GENetConfig.model_validate(SMALL | {"blocks": [block]})
    ((where, sentence),) = problems_of(caught.value, GENetConfig)
    assert where == ("blocks", 0) and said in sentence
    assert sentence.startswith(f"got {block!r}, expected [kind, channels, layers, stride, kernel] (")
    assert sentence.endswith('; write one such as ["BL", 384, 7, 2]')


def test_it_learns() -> None:
    """Twenty steps on 200 small images of ten colours lower the loss by a third at least."""
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    labels = torch.arange(200) % 10
    colours = torch.rand(10, 3, 1, 1, generator=generator)
    images = colours[labels] + 0.1 * torch.randn(200, 3, 32, 32, generator=generator)
    network = GENet(8, (Block("XX", 16, 1, 2), Block("BL", 32, 1, 2), Block("DW", 32, 1, 2)), 64, num_classes=10)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0], losses
