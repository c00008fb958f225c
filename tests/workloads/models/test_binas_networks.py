"""Networks of BINAS and their supernet (arXiv 2110.12399)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from tests.learning import pretrained
from tests.toy import make_job
from tests.toy_methods import toy_method_job
from workloads import artifact
from workloads.models.architecture import parse
from workloads.models.binas import Binas, BinasConfig, Inverted, SqueezeExcite, published
from workloads.models.binas_space import Paths, Space
from workloads.models.binas_supernet import BinasSupernet, BinasSupernetConfig, Elastic
from workloads.models.encoders import build_encoder, classifier_of, layer_ids, timm_folder_config
from workloads.models.timm_import import timm
from workloads.search.latency import folded
from workloads.spec import Named

SPACE = Space(stem=8, first=8, widths=(8, 16), strides=(1, 2), relu_stages=1, last=24, features=12)
SMALL = "[['ds_r1_k3_s1_e1_c8_nre'], ['ir_r1_k5_s2_e3_c16_nre_se0.25', 'ir_r1_k3_s1_e4_c16'], ['cn_r1_k1_s1_c24']]"
HARDCORENAS_A = (  # of timm
    "[['ds_r1_k3_s1_e1_c16_nre'], ['ir_r1_k5_s2_e3_c24_nre', 'ir_r1_k5_s1_e3_c24_nre_se0.25'], "
    "['ir_r1_k5_s2_e3_c40_nre', 'ir_r1_k5_s1_e6_c40_nre_se0.25'], "
    "['ir_r1_k5_s2_e6_c80_se0.25', 'ir_r1_k5_s1_e6_c80_se0.25'], "
    "['ir_r1_k5_s1_e6_c112_se0.25', 'ir_r1_k5_s1_e6_c112_se0.25'], "
    "['ir_r1_k5_s2_e6_c192_se0.25', 'ir_r1_k5_s1_e6_c192_se0.25'], ['cn_r1_k1_s1_c960']]"
)


def used(supernet: BinasSupernet) -> BinasSupernet:
    """As if it had been trained: nothing is where it started."""
    for module in supernet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()  # type: ignore[union-attr]
            module.running_var.uniform_(0.5, 2)  # type: ignore[union-attr]
        if isinstance(module, Elastic):
            for table in (module.gain2, module.bias2, module.gain3, module.bias3):
                nn.init.normal_(table)
    return supernet.eval()


def test_it_is_timms_network_of_the_same_string() -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("hardcorenas_a", num_classes=10).eval()
    ours = Binas(HARDCORENAS_A, num_classes=10).eval()
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 64, 64)
    assert torch.equal(ours(images), theirs(images))


def test_it_is_an_encoder_a_classifier_and_timms() -> None:
    encoder: Any = build_encoder(Named(name="binas", structure=SMALL, image_size=32, stem=8, features=12))
    images = torch.randn(2, 3, 32, 32)
    assert encoder.eval()(images).shape == (2, encoder.num_features) == (2, 12)
    assert encoder.forward_features(images).shape == (2, 24, 8, 8)
    ours: Any = classifier_of(encoder, 5)
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=5, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours(images), theirs.eval()(images))
    ids, last = layer_ids(ours)
    assert ids["conv_stem.weight"] == 0 < ids["blocks.0.0.conv_dw.weight"]
    assert ids["blocks.1.0.conv_dw.weight"] < ids["blocks.1.1.conv_dw.weight"] < last == ids["classifier.weight"]


def test_latencies_are_of_folded_blocks() -> None:
    """Convolution and BatchNorm follow each other in an `nn.Sequential`, which is what is folded."""
    block = next(module for module in Binas(SMALL).modules() if isinstance(module, Inverted)).eval()
    fused = folded(block)
    assert not [module for module in fused.modules() if isinstance(module, nn.BatchNorm2d)]
    x = torch.randn(2, 8, 6, 6)
    assert torch.allclose(fused(x), block(x), atol=1e-5)


def test_names_of_the_paper_and_wrong_ones() -> None:
    assert BinasConfig(structure="binas-a").structure == published()["binas-a"]
    assert [len(stage) for stage in parse(published()["binas-f"])] == [1, 3, 4, 4, 4, 4, 1]
    with pytest.raises(
        ValidationError, match=r"got structure 'binas-g', expected an architecture string or one of binas-a"
    ):
        BinasConfig(structure="binas-g")
    with pytest.raises(ValidationError, match=r"structure\n.*'ir_r1_k4_s1_e3_c24' at character 2"):
        BinasConfig(structure="[['ir_r1_k4_s1_e3_c24']]")


@pytest.mark.parametrize(
    "space",
    [SPACE, SPACE.model_copy(update={"se": (False,), "kernels": (3, 5, 7), "expansions": (2,), "min_depth": 1})],
)
def test_each_image_goes_through_the_network_of_its_path(space: Space) -> None:
    torch.manual_seed(0)
    supernet = used(BinasSupernet(space, num_classes=5))
    images = torch.randn(6, 3, 16, 16)
    paths = space.random_paths(torch.arange(6))
    together = supernet(images, paths)
    for i in range(6):
        configurations, depths = paths.configuration[i].tolist(), paths.depth[i].tolist()
        network = Binas(space.architecture(configurations, depths), space.stem, space.features, num_classes=5)
        network.load_state_dict(supernet.weights_of(configurations, depths))
        assert torch.allclose(network.eval()(images[i : i + 1]), together[i], atol=1e-5)


def test_alone_it_is_its_largest_network() -> None:
    torch.manual_seed(0)
    supernet = used(BinasSupernet(SPACE, num_classes=5))
    images = torch.randn(2, 3, 16, 16)
    largest = Paths(torch.full((2, 2, 4), len(SPACE.configurations) - 1), torch.full((2, 2), 2))
    assert torch.allclose(supernet(images), supernet(images, largest), atol=1e-6)
    squeezed = [module for module in supernet.modules() if isinstance(module, SqueezeExcite)]
    assert len(squeezed) == 8


def test_weights_of_a_network_are_copies() -> None:
    supernet = used(BinasSupernet(SPACE))
    choice = [[0] * 4] * 2, [0, 0]
    before = supernet.conv_stem.weight.clone()
    for value in supernet.weights_of(*choice).values():
        value.zero_()
    assert torch.equal(supernet.conv_stem.weight, before)


def test_blocks_behind_the_end_of_a_stage_do_not_matter_to_an_image_but_to_their_statistics() -> None:
    """They see what the block before gives, as if the stage went on."""
    supernet = BinasSupernet(SPACE).train()
    images, keys = torch.randn(8, 3, 16, 16), torch.arange(8)
    paths = SPACE.random_paths(keys)
    shallow = Paths(paths.configuration, torch.zeros_like(paths.depth))
    x = supernet.maps(images, shallow)
    again = Paths(paths.configuration.clone(), shallow.depth)
    again.configuration[:, :, 2:] = 0
    y = supernet.maps(images, again)
    assert all(torch.equal(a, b) for a, b in zip(x, y, strict=True))
    last: Any = supernet.blocks[1][-1]  # type: ignore[index]
    assert float(last.bn1.running_mean.abs().max()) > 0


def test_random_paths_are_uniform_and_belong_to_the_image() -> None:
    paths = SPACE.random_paths(torch.arange(6000))
    assert paths.configuration.shape == (6000, 2, 4) and paths.depth.shape == (6000, 2)
    counts = torch.bincount(paths.configuration.flatten())
    assert len(counts) == 12 and counts.min() > 0.9 * 4000 and counts.max() < 1.1 * 4000
    depths = torch.bincount(paths.depth.flatten())
    assert len(depths) == 3 and depths.min() > 0.9 * 4000
    one = SPACE.random_paths(torch.tensor([17]))
    assert torch.equal(one.configuration[0], paths.configuration[17]) and torch.equal(one.depth[0], paths.depth[17])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"strides": (1,)}, "got 2 widths and 1 strides"),
        ({"min_depth": 5}, "got min_depth=5, expected at most max_depth, 4"),
        ({"expansions": (6, 3)}, "expected each once, the smaller first"),
        ({"kernels": (3, 4)}, "expected 3, 5 or 7"),
        ({"depth": 3}, "depth"),
        ({"max_depth": 10**9}, "expected at most 10,000; allow fewer"),
        ({"widths": (8,) * 200, "strides": (1,) * 200, "max_depth": 5}, "got a space of .* products of blocks"),
    ],
)
def test_a_wrong_space_is_refused(changed: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        BinasSupernetConfig.model_validate(SPACE.model_dump() | changed)


def test_the_default_space_holds_the_published_networks() -> None:
    """Each of its strings is a choice of the paper's space."""
    space = Space()
    assert len(space.configurations) == 12
    for structure in published().values():
        architecture = parse(structure)
        configurations, depths = [], []
        for s, stage in enumerate(architecture[1:-1]):
            of_stage = [next(c for c in range(12) if space.block(s, b, c) == block) for b, block in enumerate(stage)]
            configurations.append(of_stage + [0] * (4 - len(stage)))
            depths.append(list(space.depths).index(len(stage)))
        assert space.architecture(configurations, depths) == architecture


@pytest.mark.parametrize("which", ["child", "supernet"])
def test_artifacts_come_back(which: str, toy_shards: dict[str, str], tmp_path: Path) -> None:
    child = {"name": "binas", "structure": SMALL, "image_size": 16, "stem": 8, "features": 12}
    scratch = {"name": "fine_tune", "layer_decay": 0.9, "drop_path": 0}
    job = (
        make_job(toy_shards, method=scratch, model=child, epochs=None, steps=2)
        if which == "child"
        else toy_method_job(toy_shards, "binas", epochs=None, steps=2)
    )
    folder = pretrained(job, tmp_path, which)
    model = artifact.load_model(folder)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(model(images), theirs(images)) and model(images).shape == (2, 4)
