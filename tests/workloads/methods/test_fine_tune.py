"""The fine-tuning head and layer decay of MAE's appendix A.1 (arXiv 2111.06377)."""

from __future__ import annotations

import pytest
import torch

from workloads.methods.base import DataInfo, Inputs
from workloads.methods.fine_tune import FineTune, FineTuneConfig
from workloads.models.encoders import layer_ids
from workloads.models.vit import ViT, ViTConfig


def fine_tune(depth: int, **config: object) -> FineTune:
    encoder = ViTConfig(image_size=16, patch_size=4, dim=16, depth=depth, heads=2).build()
    info = DataInfo(num_instances=8, num_classes=3, shape=(3, 16, 16))
    return FineTune(FineTuneConfig.model_validate(config), Inputs(encoder, info, None, None))  # type: ignore[arg-type]


def test_layer_scales_golden() -> None:
    """Card of MAE, check 7: depth 12, decay .65."""
    method = fine_tune(12, layer_decay=0.65)
    ids, last = layer_ids(method.classifier)
    assert last == 13
    scales = {
        ids[name]: group["lr_scale"]
        for group in method.parameter_groups()
        for name, parameter in method.classifier.named_parameters()
        if any(parameter is p for p in group["params"])
    }
    assert scales[0] == pytest.approx(0.003697, abs=1e-6)
    assert scales[12] == pytest.approx(0.65)
    assert scales[13] == 1.0


def test_positions_cls_and_vectors_do_not_decay() -> None:
    method = fine_tune(2)
    named = {id(p): name for name, p in method.classifier.named_parameters()}
    groups = method.parameter_groups()
    assert sum(len(group["params"]) for group in groups) == len(named)  # each trained once
    for group in groups:
        for parameter in group["params"]:
            name = named[id(parameter)]
            free = parameter.ndim <= 1 or name in ("pos_embed", "cls_token")
            assert group["weight_decay"] == (0.0 if free else None), name


def test_head_averages_patches_without_cls() -> None:
    method = fine_tune(1).eval()
    classifier = method.classifier
    assert isinstance(classifier, ViT)
    images = torch.randn(2, 3, 16, 16)
    tokens = classifier.forward_features(images)
    expected = classifier.head(classifier.fc_norm(tokens[:, 1:].mean(dim=1)))
    assert torch.equal(classifier(images), expected)
    assert isinstance(classifier.norm, torch.nn.Identity)
    assert classifier.pos_embed.requires_grad
    assert classifier.head.weight.std() < 1e-4  # type: ignore[union-attr]


def test_unlabelled_data_is_refused() -> None:
    encoder = ViTConfig(image_size=16, patch_size=4, dim=16, depth=1, heads=2).build()
    info = DataInfo(num_instances=8, num_classes=0, shape=(3, 16, 16))
    with pytest.raises(ValueError, match="got data with 0 classes"):
        FineTune(FineTuneConfig(), Inputs(encoder, info, None, None))  # type: ignore[arg-type]
