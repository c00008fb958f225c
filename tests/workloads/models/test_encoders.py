"""Arguments of timm's architectures in a job: what is built, what is refused, and that artifacts keep them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import nn

from tests.toy_artifact import SIZE, write_artifact
from workloads import artifact
from workloads.models.encoders import build_encoder, classifier_of
from workloads.models.timm_import import timm
from workloads.models.vit import ViT, ViTConfig
from workloads.spec import Named
from workloads.weights import load_initial

SHARED_POSITIONS = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_fc_norm": False}
BEIT: dict[str, Any] = {
    "name": "beit_base_patch16_224",
    "image_size": SIZE,
    "patch_size": 4,
    "options": {"embed_dim": 16, "depth": 2, "num_heads": 2, "init_values": 0.1, **SHARED_POSITIONS},
}


def test_the_paper_s_beit() -> None:
    with torch.device("meta"):
        encoder: Any = build_encoder(
            Named(name="beit_base_patch16_224", options={"init_values": 0.1, "drop_path_rate": 0.1, **SHARED_POSITIONS})
        )
    tables = [name for name, _ in encoder.named_parameters() if name.endswith("relative_position_bias_table")]
    assert tables == ["rel_pos_bias.relative_position_bias_table"]
    assert encoder.blocks[0].gamma_1 is not None
    assert encoder.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)
    assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(85.7e6, rel=0.01)


class Nothing(nn.Module):
    """In the place of a method that takes a plain ViT only."""

    def __init__(self, *_: object) -> None:
        super().__init__()


@pytest.mark.parametrize("kind", ["encoder", "classifier"])
def test_an_artifact_keeps_the_options(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.toy_artifact.MAE", Nothing)
    folder = write_artifact(tmp_path / "artifact", kind, model=BEIT)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    images = torch.randn(2, 3, SIZE, SIZE)
    assert torch.allclose(artifact.load_model(folder)(images), theirs(images), atol=1e-5)


def test_relative_positions_are_carried_into_fine_tuning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.toy_artifact.MAE", Nothing)
    source: Any = artifact.load_model(write_artifact(tmp_path / "artifact", "encoder", model=BEIT))
    torch.nn.init.normal_(source.rel_pos_bias.relative_position_bias_table)
    save_file(source.state_dict(), tmp_path / "beit.safetensors")
    target: Any = build_encoder(Named.model_validate(BEIT))
    assert load_initial(target, str(tmp_path / "beit.safetensors"), tmp_path) == []
    classifier: Any = classifier_of(target, 3, drop_path=0.0)
    tables = (one.rel_pos_bias.relative_position_bias_table for one in (source, classifier))
    assert torch.equal(*tables)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"options": {"init_value": 0.1}}, "got .*'init_value': 0.1.* expected arguments that it takes.*init_value"),
        ({"options": {"global_pool": "max"}}, "expected arguments that it takes: Only avg or token"),
        ({"options": {"embed_dim": -16}}, "expected arguments that it takes"),
    ],
)
def test_what_the_architecture_refuses(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        build_encoder(Named.model_validate(BEIT | change))


@pytest.mark.parametrize(
    "options",
    [{"pretrained": True}, {"checkpoint_path": "a.pth"}, {"num_classes": 3}, {"img_size": 8}, {"patch_size": 8}],
)
def test_options_that_are_set_elsewhere_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=f"got options {next(iter(options))}, expected arguments of the archit"):
        build_encoder(Named.model_validate(BEIT | {"options": options}))


def test_a_plain_vit_of_other_sizes_is_ours() -> None:
    name, sizes = "vit_tiny_patch16_224", {"embed_dim": 32, "depth": 2, "num_heads": 4, "patch_size": 4}
    encoder = build_encoder(Named(name=name, image_size=16, options=sizes, drop_path_rate=0.5))
    assert isinstance(encoder, ViT)
    assert encoder.config == ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4)
    assert encoder.blocks[1].drop_path == 0.5
    for more in ({"attn_drop_rate": 0.1}, {"init_values": 1e-5}, {"dynamic_img_size": True}):
        other = build_encoder(Named(name=name, image_size=16, options=sizes | more))
        assert not isinstance(other, ViT), f"ours has no {more}"
