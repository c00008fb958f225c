"""Networks of MAE-DET: what they compute, and the maps that a detector takes from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.inference import Model
from workloads.models.encoders import build_encoder, classifier_of, layer_ids
from workloads.models.maedet import Layer, MAEDet, MAEDetConfig, published
from workloads.models.maedet_structure import Block, parameters, parse, plain, text
from workloads.models.timm_import import timm
from workloads.parts.feature_maps import dense_features
from workloads.spec import Named

SMALL = [
    {"class": "ConvKXBNRELU", "in": 3, "out": 8, "s": 2, "k": 3},
    {"class": "ResK1KXK1", "in": 8, "out": 16, "s": 2, "k": 3, "L": 2, "btn": 8},
    {"class": "ResK1KX", "in": 16, "out": 16, "s": 2, "k": 5, "L": 1, "btn": 8},
    {"class": "ResK1KXK1", "in": 16, "out": 20, "s": 2, "k": 3, "L": 1, "btn": 12},
    {"class": "ResKXKX", "in": 20, "out": 24, "s": 1, "k": 3, "L": 2, "btn": 8},
    {"class": "ResK1KXK1", "in": 24, "out": 32, "s": 2, "k": 3, "L": 1, "btn": 16},
]
MODEL: dict[str, Any] = {"name": "maedet", "structure": SMALL, "image_size": 32}
IMAGES = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("S", (32, 48, 272, 1024, 2048)), ("M", (64, 120, 512, 1632, 2048)), ("L", (80, 144, 608, 1912, 2400))],
)
def test_maps_for_a_detector_of_networks_of_the_paper(name: str, channels: tuple[int, ...]) -> None:
    with torch.device("meta"):
        network: Any = build_encoder(Named(name="maedet", structure=name))
        maps = network.pyramid(torch.empty(1, 3, 480, 640), levels=(2, 3, 4, 5))
    assert (network.strides, network.channels) == ((2, 4, 8, 16, 32), channels)
    assert [tuple(x.shape) for x in maps] == [
        (1, C, 480 // stride, 640 // stride) for C, stride in zip(channels[1:], (4, 8, 16, 32), strict=True)
    ]
    assert sum(p.numel() for p in network.parameters()) == parameters(published()[name])


def test_a_stage_has_the_block_of_stride_1_behind_it() -> None:
    network = MAEDet(SMALL)
    assert (network.strides, network.channels) == ((2, 4, 8, 16, 32), (8, 16, 16, 24, 32))
    last = network.pyramid(IMAGES)[-1]
    assert torch.equal(last, network.forward_features(IMAGES)) and last.shape == (2, 32, 2, 3)
    assert [len(network.pyramid(IMAGES, levels)) for levels in ((1,), (2, 4), (5, 4, 3, 2, 1))] == [1, 2, 5]
    with pytest.raises(ValueError, match=r"got levels \[6\], expected some of \[1, 2, 3, 4, 5\]"):
        network.pyramid(IMAGES, (5, 6))


@pytest.mark.parametrize("size", [(65, 97), (33, 31), (1, 7)])
def test_maps_of_images_of_odd_sizes(size: tuple[int, int]) -> None:
    network = MAEDet(SMALL).eval()
    shapes = [tuple(x.shape[2:]) for x in network.pyramid(torch.zeros(1, 3, *size))]
    assert shapes == [tuple(-(-side // stride) for side in size) for stride in (8, 16, 32)]


def test_timm_gives_the_same_maps(tmp_path: Path) -> None:
    """As detectors of other libraries ask for them, from the folder of an artifact."""
    folder = write_artifact(tmp_path / "artifact", "classifier", model=MODEL)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True, out_indices=(2, 3, 4))
    assert theirs.feature_info.channels() == [16, 24, 32]
    assert theirs.feature_info.reduction() == [8, 16, 32]
    ours: Any = artifact.load_model(folder)
    for a, b in zip(ours.pyramid(IMAGES), theirs.eval()(IMAGES), strict=True):
        assert torch.equal(a, b)


def test_an_fpn_takes_its_maps() -> None:
    from torchvision.ops import FeaturePyramidNetwork

    network = MAEDet(SMALL)
    fpn = FeaturePyramidNetwork(list(network.channels[2:]), 8)
    found = fpn({f"C{level}": x for level, x in zip((3, 4, 5), network.pyramid(IMAGES), strict=True)})
    assert [tuple(x.shape) for x in found.values()] == [(2, 8, 8, 12), (2, 8, 4, 6), (2, 8, 2, 3)]
    sum(x.sum() for x in found.values()).backward()
    assert all(p.grad is not None for p in network.parameters())


def test_layers() -> None:
    """The shortcut takes means of 2 x 2, then a convolution of stride 1; later layers add what comes in."""
    block = Block.model_validate({"class": "ResK1KXK1", "in": 4, "out": 6, "s": 2, "k": 3, "L": 2, "btn": 5})
    first, later = (Layer(branch).eval() for branch, _ in block.parts())
    x = torch.randn(1, 4, 4, 4)
    nn.init.zeros_(first.branch[-1].weight)  # type: ignore[arg-type]
    project: Any = first.shortcut
    assert (project[1].kernel_size, project[1].stride, project[1].bias) == ((1, 1), (1, 1), None)
    means = x.reshape(1, 4, 2, 2, 2, 2).mean(dim=(3, 5))
    assert torch.allclose(first(x), project[2](project[1](means)).relu())
    nn.init.zeros_(later.branch[-1].weight)  # type: ignore[arg-type]
    y = torch.randn(1, 6, 4, 4)
    assert torch.equal(later(y), y.relu())
    assert [m.stride[0] for m in first.branch if isinstance(m, nn.Conv2d)] == [1, 2, 1]


def test_it_is_an_encoder_and_a_classifier(tmp_path: Path) -> None:
    encoder: Any = build_encoder(Named(**MODEL)).eval()
    features = encoder(IMAGES)
    assert features.shape == (2, encoder.num_features) == (2, 32)
    maps, pooled = dense_features(encoder, IMAGES)
    assert maps.shape == (2, 32, 2, 3) and torch.equal(pooled, features)
    ids, last = layer_ids(classifier_of(encoder, 5))
    assert ids["blocks.0.0.branch.0.weight"] == 0 and ids["fc.weight"] == last
    assert ids["blocks.1.0.branch.0.weight"] < ids["blocks.1.1.branch.0.weight"] < ids["blocks.2.0.branch.0.weight"]
    folder = write_artifact(tmp_path / "artifact", "classifier", model=MODEL)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(artifact.load_model(folder)(IMAGES), theirs(IMAGES))
    served = Model(folder)
    assert len(served.features([torch.zeros(3, 32, 32, dtype=torch.uint8)])[0]) == served.card.num_features == 32


def test_it_is_a_backbone_of_deeplab() -> None:
    options = {"structure": SMALL}
    deeplab: Any = build_encoder(
        Named(name="deeplab", backbone="maedet", options=options, image_size=64, output_stride=32, channels=4)
    )
    assert deeplab.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 4, 2, 2)


def test_structures_by_name_as_lists_and_as_text() -> None:
    assert list(published()) == ["S", "M", "L"]
    by_list, by_text = (MAEDetConfig.model_validate({"structure": given}) for given in (SMALL, text(parse(SMALL))))
    assert by_list == by_text and plain(by_list.structure) == SMALL
    assert MAEDetConfig.model_validate({"structure": "S"}).structure == published()["S"]
    with pytest.raises(ValidationError, match="got structure 'XL', expected a list of blocks or one of S, M, L"):
        MAEDetConfig.model_validate({"structure": "XL"})
    wrong = [*SMALL[:1], SMALL[1] | {"k": 4}]
    with pytest.raises(ValidationError, match="in block 2, k: got 4"):
        MAEDetConfig.model_validate({"structure": wrong})
