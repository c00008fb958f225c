"""Patch tokens are the same from our ViT and timm's; hidden patches leave no trace in any transformer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workloads.models.encoders import timm_folder_config
from workloads.models.timm_import import timm
from workloads.models.vit import ViTConfig
from workloads.parts.patches import patchify, unpatchify
from workloads.parts.tokens import grid_of, hidden_patches, patch_size_of, patch_tokens

SMALL = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4)
WIDTH = {"embed_dim": 32, "num_heads": 4, "num_classes": 0}


def ours() -> nn.Module:
    return SMALL.build()


def plain() -> nn.Module:
    """timm's counterpart of `ours`."""
    config = timm_folder_config(ours())
    model: nn.Module = timm.create_model(config["architecture"], num_classes=0, **config["model_args"])
    return model


def registers() -> nn.Module:
    """CLS and four registers before the patches; images of any size."""
    sizes = {"img_size": 16, "patch_size": 4, "depth": 2, "reg_tokens": 4, "dynamic_img_size": True}
    model: nn.Module = timm.create_model("vit_tiny_patch16_224", **WIDTH, **sizes)
    return model


def beit() -> nn.Module:
    shared = {"use_shared_rel_pos_bias": True, "use_rel_pos_bias": False, "use_fc_norm": False}
    model: nn.Module = timm.create_model(
        "beit_base_patch16_224", **WIDTH, img_size=16, patch_size=4, depth=2, init_values=0.1, **shared
    )
    return model


def swin() -> nn.Module:
    """4 x 4 patches, merged to 2 x 2 of twice the width."""
    sizes = {"img_size": 16, "patch_size": 4, "window_size": 2, "embed_dim": 16, "depths": (1, 1), "num_heads": (2, 4)}
    model: nn.Module = timm.create_model("swin_tiny_patch4_window7_224", num_classes=0, **sizes)
    return model


TRANSFORMERS = [ours, plain, registers, beit, swin]


@pytest.fixture(params=TRANSFORMERS, ids=lambda build: build.__name__)
def encoder(request: pytest.FixtureRequest) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = request.param().eval()
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("norm", [True, False])
def test_the_same_weights_give_the_same_tokens(norm: bool, images: Tensor) -> None:
    a, b = ours().eval(), plain().eval()
    b.load_state_dict(a.state_dict())
    assert torch.allclose(patch_tokens(a, images, norm=norm), patch_tokens(b, images, norm=norm), atol=1e-5)


def test_grid_and_patch_size(encoder: nn.Module) -> None:
    assert grid_of(encoder) == 4
    assert patch_size_of(encoder) == 4


@pytest.mark.parametrize("norm", [True, False])
def test_tokens_are_those_of_the_patches_only(encoder: nn.Module, norm: bool, images: Tensor) -> None:
    tokens = patch_tokens(encoder, images, norm=norm)
    assert tokens.shape == ((2, 4, 32) if "Swin" in type(encoder).__name__ else (2, 16, 32))


def test_the_final_norm_is_all_that_norm_adds(encoder: nn.Module, images: Tensor) -> None:
    final: Any = encoder.norm
    with_norm, without = (patch_tokens(encoder, images, norm=norm) for norm in (True, False))
    assert not torch.allclose(with_norm, without)
    assert torch.allclose(with_norm, final(without), atol=1e-5)


def test_tokens_are_in_image_order() -> None:
    """Without attention a token depends on its own patch alone."""
    encoder = ours().eval()
    for block in encoder.blocks:  # type: ignore[union-attr]
        block.attn.proj.weight.data.zero_()  # type: ignore[union-attr]
    patches = torch.zeros(1, 16, 48)
    before = patch_tokens(encoder, unpatchify(patches, 4))
    patches[0, 6] = 1.0
    changed = (patch_tokens(encoder, unpatchify(patches, 4)) - before).abs().amax(dim=2) > 0
    assert changed[0].nonzero().flatten().tolist() == [6]


def test_other_images_where_the_network_takes_any() -> None:
    assert patch_tokens(registers().eval(), torch.zeros(1, 3, 32, 32), norm=False).shape == (1, 64, 32)


def test_what_is_under_hidden_patches_has_no_influence(encoder: nn.Module, images: Tensor) -> None:
    token = torch.randn(1, 1, encoder.get_parameter("patch_embed.proj.weight").shape[0], requires_grad=True)
    mask = torch.zeros(2, 16)
    mask[0, :5] = mask[1, 9:] = 1
    other = unpatchify(patchify(images, 4) + mask[:, :, None], 4)

    with hidden_patches(encoder, mask, token):
        hidden = patch_tokens(encoder, images)
        assert torch.equal(hidden, patch_tokens(encoder, other))
    hidden.sum().backward()
    assert token.grad is not None and token.grad.abs().max() > 0

    plain = patch_tokens(encoder, images)
    assert not torch.allclose(plain, hidden), "the mask hides something"
    assert not torch.allclose(plain, patch_tokens(encoder, other)), "behind the block everything is seen again"


def test_a_token_takes_the_place_of_its_patch_before_positions_are_added() -> None:
    encoder, token = SMALL.build(), torch.full((1, 1, 32), 7.0)
    mask = torch.zeros(1, 16, dtype=torch.bool)
    mask[0, 3] = True
    with hidden_patches(encoder, mask, token):
        embedded = encoder.embed(torch.zeros(1, 3, 16, 16))
    assert torch.allclose(embedded[0, 3], 7.0 + encoder.pos_embed[0, 1 + 3])
    assert not torch.allclose(embedded[0, 4], 7.0 + encoder.pos_embed[0, 1 + 4])


def test_an_error_inside_leaves_the_network_as_it_was(images: Tensor) -> None:
    encoder = ours().eval()
    before = patch_tokens(encoder, images)
    with pytest.raises(RuntimeError, match="stop"), hidden_patches(encoder, torch.ones(2, 16), torch.zeros(1, 1, 32)):
        raise RuntimeError("stop")
    assert torch.equal(patch_tokens(encoder, images), before)


def test_a_network_without_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="got model ResNet, expected one that cuts images into patches"):
        grid_of(timm.create_model("test_resnet", num_classes=0))
