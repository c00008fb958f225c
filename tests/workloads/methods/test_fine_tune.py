"""The fine-tuning head and layer decay of MAE's appendix A.1 (arXiv 2111.06377)."""

from __future__ import annotations

import pytest
import torch

from workloads.data.keys import sample_keys
from workloads.data.transforms.erasing import Erasing
from workloads.data.transforms.mixing import Mixing, apply
from workloads.data.transforms.randaugment import RandAugment
from workloads.flops import count
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.fine_tune import FineTune, FineTuneConfig
from workloads.models.encoders import layer_ids
from workloads.models.vit import ViT, ViTConfig

START = Progress(step=0, epoch=0, total_steps=10)


def fine_tune(depth: int, **config: object) -> FineTune:
    encoder = ViTConfig(image_size=16, patch_size=4, dim=16, depth=depth, heads=2).build()
    info = DataInfo(num_instances=8, num_classes=3, shape=(3, 16, 16))
    return FineTune(FineTuneConfig.model_validate(config), Inputs(encoder, info, None, None))  # type: ignore[arg-type]


def test_layer_scales_golden() -> None:
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


def labelled(n: int = 4) -> dict[str, torch.Tensor]:
    index = torch.arange(n)
    images = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    return {"image": images, "label": index % 3, "index": index, "key": sample_keys(0, 0, index)}


def test_strong_augmentation_is_off_unless_it_is_named() -> None:
    config = FineTuneConfig()
    assert config.mixup == config.cutmix == 0
    view = FineTune.views(config, 224)["image"]
    assert view.randaugment is None and view.erasing is None
    images, target = fine_tune(1).mix(data := labelled())
    assert images is data["image"] and target is data["label"]


def test_the_published_augmentation_is_timms() -> None:
    """Table 9: RandAug (9, 0.5), erasing of the released code."""
    randaugment = {"magnitude": 9, "magnitude_std": 0.5, "increasing": True}
    config = FineTuneConfig.model_validate({"view": {"randaugment": randaugment, "erasing": {"p": 0.25}}})
    view = FineTune.views(config, 224)["image"]
    assert view.randaugment == RandAugment.parse("rand-m9-mstd0.5-inc1")
    assert view.erasing == Erasing()


def test_the_loss_of_mixed_samples_is_that_of_timm() -> None:
    """Soft cross-entropy with shares of smoothed labels; accuracy is of the sample's own label."""
    method, data = fine_tune(1, mixup=0.8, cutmix=1.0, drop_path=0).train(), labelled(6)
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, smoothing=0.1, mode="elem")
    images, targets = apply(mixing, data["image"], data["label"], 3, data["key"], "fine_tune")
    logits = method.classifier(images)
    expected = -(targets * logits.log_softmax(dim=1)).sum(dim=1).mean()
    output = method(data, START)
    assert output.loss is not None
    assert output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert output.metrics["accuracy"] == (logits.argmax(dim=1) == data["label"]).float().mean()
    assert not torch.equal(images, data["image"])


@pytest.mark.parametrize(("config", "cut"), [({"mixup": 0.8}, False), ({"cutmix": 1.0}, True)])
def test_mixup_and_cutmix_apart(config: dict[str, float], cut: bool) -> None:
    """Of CutMix every pixel is of one of the two images, of mixup none is."""
    data = labelled(6)
    images, target = fine_tune(1, **config).mix(data)
    one_of_both = (images == data["image"]) | (images == data["image"].flip(0))
    assert one_of_both.float().mean() == (1.0 if cut else pytest.approx(0.0, abs=0.01))
    assert torch.allclose(target.sum(dim=1), torch.ones(6)) and target.shape == (6, 3)


def test_what_is_drawn_for_a_sample_is_its_own() -> None:
    """In other company the partner is another, the share is not."""
    method = fine_tune(1, mixup=0.8)
    six = labelled(6) | {"image": torch.ones(6, 3, 16, 16)}
    six["image"][0] = 0.0  # the others are alike, so its mixture tells its share
    three = {name: value[:3] for name, value in six.items()}
    assert torch.equal(method.mix(six)[0][0], method.mix(three)[0][0])


def test_flops_of_mixed_samples_are_counted() -> None:
    assert count(fine_tune(2, mixup=0.8, cutmix=1.0), labelled(), START) == count(fine_tune(2), labelled(), START)
