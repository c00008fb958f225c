"""The linear probe of MAE's appendix (arXiv 2111.06377): what is frozen, what is trained, what is exported."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.toy import random_images
from tests.workloads.methods.test_mae import START
from workloads.methods.base import DataInfo, Inputs
from workloads.methods.linear_probe import LinearProbe, LinearProbeConfig
from workloads.models.timm_import import timm
from workloads.models.vit import ViT, ViTConfig

INFO = DataInfo(num_instances=8, num_classes=3, shape=(3, 16, 16))


def probe(encoder: nn.Module | None = None, info: DataInfo = INFO, **config: Any) -> LinearProbe:
    torch.manual_seed(0)
    encoder = encoder or ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4).build()
    return LinearProbe(LinearProbeConfig.model_validate(config), Inputs(encoder, info, None, None))  # type: ignore[arg-type]


def randomised(method: LinearProbe) -> LinearProbe:
    """As if it had been trained."""
    generator = torch.Generator().manual_seed(3)
    method.head.weight.data.normal_(generator=generator)
    method.head.bias.data.normal_(generator=generator)
    for images in torch.randn(5, 8, 3, 16, 16, generator=generator):
        method.train().logits(images)
    return method.eval()


def test_only_the_layer_is_trained_and_the_encoder_stays_in_eval_mode() -> None:
    method = probe().train()
    assert [name for name, p in method.named_parameters() if p.requires_grad] == ["head.weight", "head.bias"]
    assert method.norm.training and not any(module.training for module in method.encoder.modules())
    seen: list[bool] = []
    method.encoder.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    loss = method(random_images(), START).loss
    assert seen == [False] and loss is not None
    loss.backward()
    assert all(p.grad is None for p in method.encoder.parameters())
    assert {"encoder.module.cls_token", "norm.running_mean"} <= method.state_dict().keys()


def test_the_bias_of_the_layer_does_not_decay() -> None:
    decays, no_decay = probe().parameter_groups()
    assert [p.ndim for p in decays["params"]] == [2]
    assert [p.ndim for p in no_decay["params"]] == [1] and no_decay["weight_decay"] == 0


def test_it_starts_as_the_paper_says() -> None:
    encoder = ViTConfig(image_size=16, patch_size=4, dim=512, depth=1, heads=4).build()
    method = probe(encoder, DataInfo(num_instances=8, num_classes=50, shape=(3, 16, 16)))
    assert method.head.weight.std().item() == pytest.approx(0.01, rel=0.03) and not method.head.bias.any()
    assert not method.norm.affine and method.norm.eps == 1e-6


@pytest.mark.parametrize("pool", ["cls", "mean"])
def test_features_are_normalised_by_the_batch(pool: str) -> None:
    method, data = probe(pool=pool), random_images()
    vit = method.encoder.module
    assert isinstance(vit, ViT)
    tokens = vit.forward_features(data["image"])
    features = tokens[:, 0] if pool == "cls" else tokens[:, 1:].mean(dim=1)
    mean, var = features.mean(dim=0), features.var(dim=0, unbiased=False)
    expected = F.linear((features - mean) / (var + 1e-6).sqrt(), method.head.weight, method.head.bias)
    assert torch.allclose(method.train().logits(data["image"]), expected, atol=1e-6)
    output = method(data, START)
    assert output.loss is not None
    assert output.loss.item() == pytest.approx(F.cross_entropy(expected, data["label"]).item(), abs=1e-6)


def test_cls_is_what_is_probed_unless_the_mean_is_asked_for() -> None:
    tokens = torch.arange(2 * 17 * 32.0).reshape(2, 17, 32)
    for config, expected in (({}, tokens[:, 0]), ({"pool": "mean"}, tokens[:, 1:].mean(dim=1))):
        vit = probe(**config).encoder.module
        assert isinstance(vit, ViT)
        assert torch.equal(vit.forward_head(tokens), expected)


@pytest.mark.parametrize(
    ("encoder", "pool"),
    [(None, "cls"), (None, "mean"), ("resnet18", "cls"), ("deit3_small_patch16_224", "cls")],
)
def test_the_exported_classifier_says_what_the_probe_says(encoder: str | None, pool: str) -> None:
    network = None
    if encoder is not None:
        network = timm.create_model(encoder, num_classes=0, **({"img_size": 16} if "deit" in encoder else {}))
    method = randomised(probe(network, pool=pool))
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(4))
    exported = method.export().eval()
    with torch.no_grad():
        expected = method.logits(images)
        assert torch.allclose(exported(images), expected, atol=1e-4)
        assert torch.equal(method.logits(images), expected)  # the method goes on as it was


def test_unlabelled_data_is_refused() -> None:
    with pytest.raises(ValueError, match="got data with 0 classes"):
        probe(info=DataInfo(num_instances=8, num_classes=0, shape=(3, 16, 16)))
