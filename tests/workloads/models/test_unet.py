"""The U-Net of the card (arXiv 2006.10511): its maps, how much of it is there, and how timm builds it again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.artifact import ArtifactError
from workloads.evaluation.base import without_head
from workloads.inference import Model
from workloads.models.encoders import build_encoder, classifier_of, layer_ids, timm_folder_config
from workloads.models.timm_import import timm
from workloads.models.unet import Segmenter, UNet, UNetConfig
from workloads.spec import Named
from workloads.weights import load_initial

SMALL: dict[str, Any] = {"name": "unet", "image_size": 16, "channels": [4, 8, 6]}
IMAGES = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_published_maps() -> None:
    """Levels of 16 to 128 channels: 6 x 6 x 128 of 192 pixels; the decoder goes back to 16 x 192 x 192."""
    expected = [(128, 6), (128, 12), (128, 24), (64, 48), (32, 96), (16, 192)]
    with torch.device("meta"):
        for blocks, (channels, side) in enumerate(expected):
            network = UNetConfig(decoder_blocks=blocks).build()
            assert network.forward_features(torch.empty(1, 1, 192, 192)).shape == (1, channels, side, side)
            assert network.num_features == channels and network(torch.empty(2, 1, 192, 192)).shape == (2, channels)


def test_a_block_doubles_smooths_and_looks_at_the_level_of_its_size() -> None:
    network = UNetConfig(image_size=16, channels=(4, 8, 6), decoder_blocks=1).build().eval()
    levels = [IMAGES.mean(dim=1, keepdim=True)]
    for i, level in enumerate(network.levels):
        levels.append(level(F.max_pool2d(levels[-1], 2) if i else levels[-1]))
    up: Any = network.decoder[0]
    doubled = levels[3].repeat_interleave(2, 2).repeat_interleave(2, 3)
    smooth = F.relu(up.smooth[2](F.conv2d(F.pad(doubled, (0, 1, 0, 1)), up.smooth[1].weight)))
    assert torch.equal(network.forward_features(IMAGES), up.convs(torch.cat([levels[2], smooth], dim=1)))


def test_every_convolution_has_batch_norm_and_no_bias() -> None:
    network = Segmenter(UNet(), 4).network
    convs = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    norms = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert len(convs) == len(norms) == 6 * 2 + 5 * 3 and all(m.bias is None for m in convs)
    assert sorted(m.kernel_size for m in convs) == [(2, 2)] * 5 + [(3, 3)] * 22


def test_a_grey_network_sees_the_mean_of_three_channels() -> None:
    network = UNetConfig(image_size=16, channels=(4, 8)).build().eval()
    assert torch.equal(network(IMAGES), network(IMAGES.mean(dim=1, keepdim=True)))
    colours = UNetConfig(image_size=16, channels=(4, 8), in_chans=3).build().eval()
    assert not torch.equal(colours(IMAGES), colours(IMAGES.flip(1)))


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("num_classes", [0, 5])
def test_timm_builds_the_same_network(blocks: int, num_classes: int) -> None:
    ours: Any = build_encoder(Named(**SMALL, decoder_blocks=blocks))
    ours = classifier_of(ours, num_classes) if num_classes else ours
    config = timm_folder_config(ours)
    theirs = timm.create_model(config["architecture"], num_classes=num_classes, **config["model_args"])
    theirs.load_state_dict(ours.state_dict())
    assert torch.equal(ours.eval()(IMAGES), theirs.eval()(IMAGES))


@pytest.mark.parametrize("blocks", [0, 1])
def test_an_artifact_loads_here_in_timm_and_in_the_predictor(blocks: int, tmp_path: Path) -> None:
    folder = write_artifact(tmp_path / "artifact", "classifier", model=SMALL | {"decoder_blocks": blocks})
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert torch.equal(artifact.load_model(folder)(IMAGES), theirs(IMAGES))
    served = Model(folder)
    pixels = [torch.zeros(3, 16, 16, dtype=torch.uint8)]
    assert len(served.features(pixels)[0]) == served.card.num_features == (8 if blocks else 6)
    classifier: Any = artifact.load_model(folder)
    features = classifier.forward_head(classifier.forward_features(IMAGES), pre_logits=True)
    assert torch.equal(without_head(classifier)(IMAGES), features)


def test_layer_ids_grow_with_depth() -> None:
    ids, last = layer_ids(classifier_of(build_encoder(Named(**SMALL, decoder_blocks=2)), 5))
    names = ["levels.0.0.1.weight", "levels.1.0.1.weight", "levels.2.1.1.weight", "decoder.0.smooth.1.weight"]
    depths = [ids[name] for name in [*names, "decoder.1.smooth.1.weight", "fc.weight"]]
    assert depths == sorted(set(depths)) and depths[0] == 0 and depths[-1] == last


def test_a_decoder_may_grow_on_weights_that_have_less_of_it(tmp_path: Path) -> None:
    """And one that is not wanted stays behind; a level that is missing is refused."""
    folders = {n: write_artifact(tmp_path / str(n), "classifier", model=SMALL | {"decoder_blocks": n}) for n in (0, 1)}
    larger: Any = build_encoder(Named(**SMALL, decoder_blocks=2))
    fresh = larger.decoder[1].smooth[1].weight.clone()
    notes = load_initial(larger, str(folders[1]), tmp_path)
    theirs: Any = artifact.load_model(folders[1])
    assert torch.equal(larger.decoder[0].smooth[1].weight, theirs.decoder[0].smooth[1].weight)
    assert torch.equal(larger.decoder[1].smooth[1].weight, fresh)
    assert any("decoder.1" in note and "fresh" in note for note in notes)
    assert any(
        "decoder.0" in note and "left out" in note
        for note in load_initial(build_encoder(Named(**SMALL)), str(folders[1]), tmp_path)
    )
    deeper = build_encoder(Named(name="unet", image_size=16, channels=[4, 8, 6, 6]))
    with pytest.raises(ArtifactError, match=r"levels\.3"):
        load_initial(deeper, str(folders[0]), tmp_path)


def test_a_segmenter_keeps_what_is_there_and_completes_it() -> None:
    network = UNetConfig(image_size=16, channels=(4, 8, 6), decoder_blocks=1).build()
    whole = Segmenter(network, 5)
    assert whole(IMAGES).shape == (2, 5, 16, 16)
    assert whole.network.levels is network.levels and whole.network.decoder[0] is network.decoder[0]
    assert len(whole.network.decoder) == 2 and len(network.decoder) == 1
    whole(IMAGES).sum().backward()
    assert all(p.grad is not None for name, p in whole.named_parameters())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"image_size": 50, "channels": (4, 8, 8)}, "expected a multiple of 4; use 48"),
        ({"channels": (4, 8, 8), "decoder_blocks": 3}, "expected at most 2"),
        ({"channels": (4,)}, "at least 2"),
    ],
)
def test_sizes_that_do_not_fit(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        UNetConfig(**wrong)
