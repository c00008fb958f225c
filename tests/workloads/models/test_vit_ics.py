"""The stem of convolutions is that of TransReID-SSL; timm builds it again."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor

from tests.toy_artifact import write_artifact
from workloads import artifact
from workloads.models.encoders import build_encoder, exported, layer_ids, timm_folder_config
from workloads.models.timm_import import timm
from workloads.models.vit_ics import IBN, ICSEmbed, ViTICSConfig
from workloads.spec import Named
from workloads.weights import load_initial

SMALL = {"name": "vit_ics", "image_size": [16, 8], "patch_size": 4, "dim": 32, "depth": 2, "heads": 4}


def wave(*shape: int) -> Tensor:
    return torch.sin(torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)).view(shape)


def test_ibn_gives_the_golden_numbers() -> None:
    y = IBN(4).double()(wave(2, 4, 3, 3))
    assert y.abs().sum().item() == pytest.approx(63.868328955, abs=1e-8)
    assert y[0, 0, 0, 0].item() == pytest.approx(0.905107620, abs=1e-8)
    assert y[1, 3, 2, 2].item() == pytest.approx(0.303006754, abs=1e-8)


def test_contrast_of_one_image_is_gone_in_one_half_and_touches_every_image_in_the_other() -> None:
    torch.manual_seed(0)
    embed = ICSEmbed(16, 384).double()
    images = torch.randn(3, 3, 32, 16, dtype=torch.float64)
    stronger = torch.cat([4 * images[:1], images[1:]])
    before, after = (embed.conv[:2](x) for x in (images, stronger))
    assert torch.allclose(before[:, :32], after[:, :32], atol=1e-4)
    changed = (before[:, 32:] - after[:, 32:]).abs().amax(dim=(1, 2, 3))
    assert (changed > 0.1).all()


def test_a_person_is_128_tokens_and_a_local_crop_32() -> None:
    torch.manual_seed(0)
    vit = build_encoder(Named(name="vit_small_ics", depth=1))
    assert vit.patch_embed(torch.randn(2, 3, 256, 128)).shape == (2, 128, 384)
    assert vit.embed(torch.randn(2, 3, 128, 64)).shape == (2, 32, 384)
    assert vit.pos_embed.shape == (1, 129, 384)


def test_the_layers_are_those_of_the_released_code() -> None:
    """Convolutions of 7, 3 and 3 at half the resolution, without bias; patches of 8 of what they see, with bias."""
    embed = ICSEmbed(16, 384)
    shapes = {name: tuple(p.shape) for name, p in embed.named_parameters()}
    half, whole = (32,), (64,)
    assert shapes == {
        "conv.0.weight": (64, 3, 7, 7),
        "conv.1.IN.weight": half,
        "conv.1.IN.bias": half,
        "conv.1.BN.weight": half,
        "conv.1.BN.bias": half,
        "conv.3.weight": (64, 64, 3, 3),
        "conv.4.IN.weight": half,
        "conv.4.IN.bias": half,
        "conv.4.BN.weight": half,
        "conv.4.BN.bias": half,
        "conv.6.weight": (64, 64, 3, 3),
        "conv.7.weight": whole,
        "conv.7.bias": whole,
        "proj.weight": (384, 64, 8, 8),
        "proj.bias": (384,),
    }
    assert embed.conv(torch.randn(1, 3, 64, 32)).shape == (1, 64, 32, 16)


@pytest.mark.parametrize(("name", "plain"), [("vit_small_ics", "vit_small"), ("vit_base_ics", "vit_base")])
def test_published_sizes_are_plain_ones_under_another_stem(name: str, plain: str) -> None:
    with torch.device("meta"):
        ours, theirs = build_encoder(Named(name=name)), build_encoder(Named(name=plain, image_size=[256, 128]))
    own, other = (
        {name: p.shape for name, p in network.named_parameters() if not name.startswith("patch_embed.")}
        for network in (ours, theirs)
    )
    assert own == other


def test_an_exported_folder_loads_in_timm(tmp_path: Path) -> None:
    for kind, classes in (("classifier", 3), ("encoder", 0)):
        spec = Named(**SMALL)
        torch.manual_seed(0)
        ours = build_encoder(spec).as_classifier(classes) if classes else build_encoder(spec)
        ours.train()(torch.randn(8, 3, 16, 8))  # its BatchNorm has seen something
        ours.eval()
        config = json.loads(json.dumps(timm_folder_config(ours)))
        folder = tmp_path / kind
        folder.mkdir()
        pretrained = {"input_size": [3, 16, 8], "num_classes": classes}
        (folder / "config.json").write_text(json.dumps(config | {"num_classes": classes, "pretrained_cfg": pretrained}))
        save_file(ours.state_dict(), folder / "model.safetensors")
        theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
        images = torch.randn(2, 3, 16, 8)
        assert torch.allclose(ours(images), theirs(images), atol=1e-5)
        again = exported(spec, classes, config["model_args"]).eval()
        again.load_state_dict(ours.state_dict())
        assert torch.equal(ours(images), again(images))


def test_an_artifact_is_a_classifier_again(tmp_path: Path) -> None:
    square = SMALL | {"image_size": 16}
    folder = write_artifact(tmp_path / "classifier", "classifier", model=square)
    model = artifact.load_model(folder)
    assert model(torch.randn(2, 3, 16, 16)).shape == (2, 7)
    ids, last = layer_ids(model)
    assert {i for name, i in ids.items() if name.startswith("patch_embed.")} == {0} and ids["head.weight"] == last


def test_weights_of_the_released_code_fit(tmp_path: Path) -> None:
    """By their names: those of a teacher, as `convert_model_dino.py` leaves them."""
    torch.manual_seed(0)
    theirs = build_encoder(Named(**SMALL)).train()
    theirs(torch.randn(8, 3, 16, 8))
    file = tmp_path / "vit_small_ics_cfs_lup.safetensors"
    save_file(theirs.state_dict(), file)
    torch.manual_seed(1)
    encoder = build_encoder(Named(**SMALL))
    load_initial(encoder, str(file), tmp_path)
    images = torch.randn(2, 3, 16, 8)
    assert torch.equal(encoder.eval()(images), theirs.eval()(images))


def test_odd_patches_are_refused() -> None:
    with pytest.raises(ValidationError, match="got patch_size=5, expected an even one"):
        ViTICSConfig(image_size=15, patch_size=5, dim=16, heads=2)
