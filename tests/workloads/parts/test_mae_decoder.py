"""The light decoder: which token stands where, what reaches it, how it starts."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from workloads.models.vit import sincos_2d
from workloads.parts.mae_decoder import DecoderConfig, MAEDecoder
from workloads.parts.masking import Mask, random_masking

SMALL = DecoderConfig(decoder_dim=16, decoder_depth=2, decoder_heads=2)
B, GRID, D = 3, 4, 24
L = GRID * GRID


def decoder(config: DecoderConfig = SMALL, outputs: int = 5) -> MAEDecoder:
    torch.manual_seed(0)
    return MAEDecoder(config, D, GRID, outputs)


def masked(ratio: float = 0.75) -> tuple[Tensor, Mask]:
    """CLS and visible tokens [B, 1 + K, D], and the mask."""
    generator = torch.Generator().manual_seed(1)
    mask = random_masking(torch.rand(B, L, generator=generator), ratio)
    return torch.randn(B, 1 + mask.ids_keep.shape[1], D, generator=generator), mask


def entering(model: MAEDecoder, latent: Tensor, mask: Mask) -> Tensor:
    """What enters the first block, [B, 1 + L, Dd]."""
    seen: list[Tensor] = []
    handle = model.blocks[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(latent, mask)
    handle.remove()
    return seen[0]


def test_defaults_are_the_papers() -> None:
    config = DecoderConfig()
    assert (config.decoder_dim, config.decoder_depth, config.decoder_heads) == (512, 8, 16)


@pytest.mark.parametrize(("dim", "heads"), [(16, 3), (18, 2)])
def test_sizes_that_do_not_divide_are_refused(dim: int, heads: int) -> None:
    with pytest.raises(ValidationError, match=f"got decoder_dim={dim} with decoder_heads={heads}"):
        DecoderConfig(decoder_dim=dim, decoder_heads=heads)


def test_visible_tokens_return_to_their_places_and_the_rest_is_the_mask_token() -> None:
    model, (latent, mask) = decoder(), masked()
    x = entering(model, latent, mask) - sincos_2d(16, GRID)
    embedded = model.embed(latent)
    assert torch.allclose(x[:, 0], embedded[:, 0], atol=1e-6)
    for b in range(B):
        for place in range(L):
            kept = (mask.ids_keep[b] == place).nonzero()
            expected = embedded[b, 1 + kept.item()] if len(kept) else model.mask_token[0, 0]
            assert torch.allclose(x[b, 1 + place], expected, atol=1e-6), (b, place)


def test_positions_tell_hidden_patches_apart() -> None:
    """They are added behind the mask tokens: else all hidden patches would be predicted alike."""
    model, (latent, mask) = decoder(), masked()
    hidden = model(latent, mask)[0][mask.mask[0] == 1]
    assert hidden.std(dim=0).min() > 1e-3


def test_every_patch_is_predicted_without_cls() -> None:
    model, (latent, mask) = decoder(outputs=7), masked()
    assert model(latent, mask).shape == (B, L, 7)
    other = latent.clone()
    other[:, 0] += 1.0
    assert not torch.allclose(model(latent, mask), model(other, mask))  # which CLS takes part in


def test_the_order_of_visible_tokens_does_not_matter() -> None:
    model, (latent, mask) = decoder(), masked(0.5)
    K = mask.ids_keep.shape[1]
    order = torch.randperm(K, generator=torch.Generator().manual_seed(2))
    inverse = torch.cat([order.argsort(), torch.arange(K, L)])
    permuted = Mask(mask.ids_keep[:, order], inverse[mask.ids_restore], mask.mask)
    tokens = torch.cat([latent[:, :1], latent[:, 1:][:, order]], dim=1)
    assert torch.allclose(model(latent, mask), model(tokens, permuted), atol=1e-5)


def test_every_block_sees_all_patches() -> None:
    model, (latent, mask) = decoder(), masked()
    seen: list[int] = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    model(latent, mask)
    assert seen == [1 + L] * 2


def test_it_starts_as_the_paper_says() -> None:
    model = decoder(DecoderConfig(decoder_dim=512, decoder_depth=1))
    assert model.mask_token.std().item() == pytest.approx(0.02, rel=0.2)
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            bound = (6 / (layer.in_features + layer.out_features)) ** 0.5  # xavier-uniform
            assert bound * 0.95 < layer.weight.abs().max() <= bound and not layer.bias.any()
    assert "pos_embed" not in dict(model.named_parameters())
    assert torch.equal(model.get_buffer("pos_embed")[0], sincos_2d(512, GRID))
