"""Where CLS looks is what its block adds up."""

from __future__ import annotations

import torch

from workloads.models.vit import ViTConfig
from workloads.parts.attention_maps import attended, attention_pictures, cls_attention
from workloads.parts.masking import random_masking


def test_the_shares_weigh_the_values_that_cls_takes_up() -> None:
    torch.manual_seed(0)
    vit = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2).build()
    images = torch.randn(3, 3, 16, 16)
    shares = cls_attention(vit, images)
    assert shares.shape == (3, 2, 16) and (shares > 0).all() and (shares.sum(dim=2) < 1).all()
    assert not vit.blocks[-1].attn.qkv._forward_hooks
    last = vit.blocks[-1]
    x = last.norm1(next(vit.layers(vit.embed(images))))
    values = last.attn.qkv(x)[..., 32:].unflatten(-1, (2, 8)).transpose(1, 2)  # [B, h, 1 + L, d]
    taken = torch.cat([1 - shares.sum(dim=2, keepdim=True), shares], dim=2)[:, :, None] @ values
    assert torch.allclose(last.attn.proj(taken.flatten(1)), last.attn(x)[:, 0], atol=1e-5)


def test_pictures_are_bright_where_cls_looks() -> None:
    attention = torch.zeros(1, 2, 4)
    attention[0, 0, 1], attention[0, 1, 2] = 0.4, 0.2
    drawn = attention_pictures(attention, (4, 4))
    assert drawn.shape == (1, 3, 4, 4)
    assert drawn[0, 0].tolist() == [[0, 0, 1, 1]] * 2 + [[0.5, 0.5, 0, 0]] * 2
    assert torch.equal(drawn[0, 0], drawn[0, 2])
    assert attention_pictures(attention, (8, 2))[0, 0, :, 0].tolist() == [0, 0, 1, 1, 0.5, 0.5, 0, 0]


def test_attention_for_noise_hides_what_cls_looks_at_most() -> None:
    torch.manual_seed(0)
    vit = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2).build()
    looked_at = cls_attention(vit, torch.randn(3, 3, 16, 16)).mean(dim=1)  # [B, L]
    mask = random_masking(looked_at, 0.25).mask.bool()
    assert mask.sum(dim=1).tolist() == [4] * 3
    assert (looked_at[mask].view(3, 4).amin(dim=1) > looked_at[~mask].view(3, 12).amax(dim=1)).all()


def test_networks_without_cls_show_the_images_alone() -> None:
    images = torch.randn(2, 3, 16, 8)
    vit = ViTConfig(image_size=(16, 8), patch_size=4, dim=16, depth=1, heads=2).build()
    drawn = attended(vit, images)
    assert drawn["image"] is images and drawn["attention"].shape == images.shape
    assert drawn["attention"].amax(dim=(1, 2, 3)).tolist() == [2.0, 2.0]
    assert attended(torch.nn.Flatten(), images) == {"image": images}
