"""DeepLab on any backbone: its head, its stride, its starting weights, and how timm builds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.artifact import ArtifactError
from workloads.evaluation.base import without_head
from workloads.inference import Model
from workloads.models.deeplab import ConvNormReLU, DeepLabConfig
from workloads.models.encoders import build_encoder, classifier_of, layer_ids, timm_folder_config
from workloads.models.maps import last_maps
from workloads.models.resnet_cifar import ResNetCifar
from workloads.models.timm_import import timm
from workloads.parts.feature_maps import dense_features
from workloads.spec import Named
from workloads.weights import load_initial

VIT = {"patch_size": 4, "dim": 16, "depth": 2, "heads": 2}
HEAD = {"channels": 8, "rates": [1, 2]}
SMALL: list[dict[str, Any]] = [
    {"image_size": 16, "backbone": "resnet_cifar", "options": {"depth": 8}, "output_stride": 4, **HEAD},
    {"image_size": 16, "backbone": "vit", "options": VIT, "output_stride": 4, **HEAD},
    {"image_size": 64, "backbone": "resnet18", **HEAD},
    {
        "image_size": 64,
        "backbone": "mobilenetv3_small_050",
        "output_stride": 32,
        **HEAD,
    },  # with a layer behind its maps
]
IDS = [model["backbone"] for model in SMALL]


def built(model: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    return build_encoder(Named.model_validate({"name": "deeplab"} | model)).eval()


def images(model: dict[str, Any], n: int = 2) -> torch.Tensor:
    size = model["image_size"]
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(0))


def test_the_paper_s_resnet_is_dilated_where_its_last_stage_would_halve() -> None:
    """Strides 1, 2, 2, 1 and dilations 1, 1, 1, 2 of the stages; the first block of the last has half of it."""
    with torch.device("meta"):
        network = DeepLabConfig().build()
        assert network.forward_features(torch.empty(2, 3, 224, 224)).shape == (2, 512, 14, 14)
    backbone: Any = network.backbone
    convolutions = [block.conv2 for block in backbone.layer4]
    assert [c.dilation for c in convolutions] == [(1, 1), (2, 2), (2, 2)]
    assert [c.stride for c in convolutions] == [(1, 1)] * 3
    assert [c.dilation for block in backbone.layer3 for c in [block.conv2]] == [(1, 1)] * 6
    assert [block.conv2.stride for block in (backbone.layer2[0], backbone.layer3[0])] == [(2, 2)] * 2
    branches: Any = network.branches
    assert [(b[0].kernel_size[0], b[0].dilation[0], b[0].in_channels) for b in branches] == [
        (1, 1, 2048),
        (3, 6, 2048),
        (3, 12, 2048),
        (3, 18, 2048),
    ]
    joined: Any = network.bottleneck
    assert joined[0].weight.shape == (512, 5 * 512, 3, 3)


@pytest.mark.parametrize("model", SMALL, ids=IDS)
def test_maps_of_the_head_and_their_mean(model: dict[str, Any]) -> None:
    network, x = built(model), images(model)
    places = model["image_size"] // model.get("output_stride", 16)
    with torch.no_grad():
        maps, features = dense_features(network, x)
        assert maps.shape == (2, 8, places, places) and maps.min() == 0  # behind a ReLU
        assert torch.equal(features, maps.mean(dim=(2, 3))) and torch.equal(network(x), features)
        assert network.num_features == 8
        below = last_maps(network.backbone, x)
        whole = network.pool(below.mean(dim=(2, 3), keepdim=True)).expand(-1, -1, places, places)
        parts = [whole, *(branch(below) for branch in network.branches)]
        assert torch.equal(maps, network.bottleneck(torch.cat(parts, dim=1)))


@pytest.mark.parametrize("model", SMALL, ids=IDS)
def test_every_trained_parameter_gets_a_gradient(model: dict[str, Any]) -> None:
    """Those behind the maps of a MobileNetV3, which nothing reads, are frozen."""
    network = built(model)
    network(images(model)).square().sum().backward()
    frozen = [name for name, p in network.named_parameters() if not p.requires_grad]
    assert [name for name, p in network.named_parameters() if p.requires_grad and p.grad is None] == []
    assert all(name.startswith("backbone.conv_head.") for name in frozen)
    assert bool(frozen) == (model["backbone"] == "mobilenetv3_small_050")


def test_tokens_of_images_that_are_no_squares_are_laid_out_as_these() -> None:
    network: Any = built(SMALL[1])
    x = torch.randn(1, 3, 8, 24)
    tokens = network.backbone.forward_features(x)[:, 1:]
    assert torch.equal(last_maps(network.backbone, x)[0, :, 1, 2], tokens[0, 8])
    assert network.forward_features(x).shape == (1, 8, 2, 6)


def test_maps_of_a_swin_are_channels_first() -> None:
    sizes = {"img_size": 64, "embed_dim": 24, "depths": (1, 1), "num_heads": (1, 2), "window_size": 4}
    network = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes).eval()
    x = torch.randn(1, 3, 64, 64)
    assert torch.equal(last_maps(network, x), network.forward_features(x).permute(0, 3, 1, 2))


def test_a_branch_of_rate_r_sees_places_r_away() -> None:
    torch.manual_seed(0)
    branch = ConvNormReLU(1, 4, 3, rate=3).eval()
    x = torch.zeros(1, 1, 9, 9, requires_grad=True)
    branch[0](x)[0, :, 4, 4].sum().backward()
    assert x.grad is not None
    assert x.grad[0, 0].nonzero().tolist() == [[i, j] for i in (1, 4, 7) for j in (1, 4, 7)]


@pytest.mark.parametrize("model", SMALL, ids=IDS)
@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_builds_the_same_network(model: dict[str, Any], num_classes: int) -> None:
    ours, x = built(model), images(model)
    features = ours(x)
    if num_classes:
        ours = classifier_of(ours, num_classes).eval()
        assert ours(x).shape == (2, 5) and ours.num_classes == 5
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=num_classes, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(x), theirs.eval()(x))
    assert torch.equal(without_head(ours)(x), features)


@pytest.mark.parametrize("model", SMALL[:2], ids=IDS[:2])
def test_an_artifact_loads_here_in_timm_and_in_the_predictor(model: dict[str, Any], tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact", "classifier", model={"name": "deeplab"} | model)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(artifact.load_model(folder)(images(model)), theirs(images(model)))
    served = Model(folder)
    pixels = [torch.zeros(3, 16, 16, dtype=torch.uint8)]
    assert len(served.features(pixels)[0]) == served.card.num_features == theirs.num_features == 8


@pytest.mark.parametrize("model", SMALL[:3], ids=IDS[:3])
def test_layer_ids_grow_with_depth(model: dict[str, Any]) -> None:
    ids, last = layer_ids(classifier_of(built(model), 5))
    vit = model["backbone"] == "vit"
    blocks = [f"backbone.blocks.{i}.attn." if vit else f"backbone.layer{1 + i}.0.conv1." for i in (0, 1)]
    found = [next(number for name, number in ids.items() if name.startswith(one)) for one in blocks]
    stem = ids["backbone.pos_embed" if vit else next(name for name in ids if name.startswith("backbone."))]
    assert 0 == stem < found[0] < found[1] < ids["branches.0.0.weight"] == ids["fc.weight"] == last


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"output_stride": 16}, "maps of 16 pixels have 4 places a side, expected 1; set output_stride: 4"),
        ({"backbone": "vit", "options": VIT, "output_stride": 8}, "have 4 places a side, expected 2"),
        ({"backbone": "vit_tiny_patch16_224", "options": {}, "image_size": 64, "output_stride": 8}, "set .*: 16"),
    ],
)
def test_another_stride_than_that_of_the_maps_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        built(SMALL[0] | change)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"backbone": "resnet_cifa"}, "did you mean 'resnet_cifar'"),
        ({"options": {"dept": 8}}, "dept"),
        ({"options": {"image_size": 8}}, "got options image_size, expected other ones"),
        ({"rates": []}, "rates"),
        ({"rates": [0]}, "rates"),
    ],
)
def test_what_does_not_fit_is_refused_by_the_config(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        DeepLabConfig.model_validate(SMALL[0] | change)


@pytest.mark.parametrize("prefix", ["", "module.encoder."])
def test_weights_of_a_backbone_start_the_backbone(prefix: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = ResNetCifar(8, num_classes=3), built(SMALL[0])
    head = target.bottleneck[0].weight.clone()
    weights = {prefix + name: value for name, value in source.state_dict().items()}
    save_file(weights, tmp_path / "resnet.safetensors")
    notes = load_initial(target, str(tmp_path / "resnet.safetensors"), tmp_path)
    assert "what is behind the backbone is fresh" in notes[-1] and "fc.weight" in " ".join(notes)
    own = target.backbone.state_dict()
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in own.items())
    assert torch.equal(target.bottleneck[0].weight, head)


def test_positions_of_a_backbone_are_resized(tmp_path: Path) -> None:
    torch.manual_seed(1)
    source = build_encoder(Named(name="vit", image_size=24, **VIT))
    save_file(source.state_dict(), tmp_path / "vit.safetensors")
    notes = load_initial(built(SMALL[1]), str(tmp_path / "vit.safetensors"), tmp_path)
    assert "pos_embed resized 6x6 -> 4x4" in notes


def test_weights_of_the_whole_network_start_all_of_it_or_a_backbone_alone(tmp_path: Path) -> None:
    source, target, alone = built(SMALL[0]), built(SMALL[0]), ResNetCifar(8)
    for parameter in source.parameters():
        nn.init.normal_(parameter)
    path = str(tmp_path / "deeplab.safetensors")
    save_file(source.state_dict(), path)
    assert load_initial(target, path, tmp_path) == []
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in target.state_dict().items())
    notes = load_initial(alone, path, tmp_path)
    assert notes[0] == f"names of {path} were taken without 'backbone.'" and len(notes) == 2
    assert torch.equal(alone.layer3[0].conv1.weight, source.backbone.layer3[0].conv1.weight)


def test_weights_of_another_backbone_or_head_are_refused(tmp_path: Path) -> None:
    path = str(tmp_path / "other.safetensors")
    save_file(ResNetCifar(14).state_dict(), path)
    with pytest.raises(ArtifactError, match=r"layer1\.1\.conv1\.weight: got .*, expected no such weight"):
        load_initial(built(SMALL[0]), path, tmp_path)
    save_file(built(SMALL[0] | {"channels": 4}).state_dict(), path)
    with pytest.raises(ArtifactError, match=r"weight: got \(4, .*\), expected \(8, "):
        load_initial(built(SMALL[0]), path, tmp_path)
