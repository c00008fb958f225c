"""MoCo v3 as the paper defines it (arXiv 2104.02057), and whether it learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.learning import RealImages, encoder_of, pretrained, untrained
from tests.toy import no_load
from workloads.data.keys import sample_keys
from workloads.data.transforms.image import finish
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.moco_v3 import JITTER, MoCoV3, MoCoV3Config, projection_head
from workloads.models.vit import ViTConfig

START = Progress(step=0, epoch=0, total_steps=10)
INFO = DataInfo(num_instances=8, num_classes=2, shape=(3, 16, 16))


def moco(**config: object) -> MoCoV3:
    torch.manual_seed(0)
    encoder = ViTConfig(image_size=16, patch_size=4, dim=32, depth=2, heads=4).build()
    validated = MoCoV3Config.model_validate({"dim": 8, "mlp_dim": 16} | config)
    return MoCoV3(validated, Inputs(encoder, INFO, no_load, no_load))  # type: ignore[arg-type]


def batch(n: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    image, other = torch.randn(2, n, 3, 16, 16, generator=generator)
    index = torch.arange(n)
    return {"image": image, "other": other, "index": index, "key": sample_keys(0, 0, index), "label": index % 2}


def test_loss_golden() -> None:
    """2 tau log(1 + 3 exp(-1 / tau)) of four orthonormal pairs at tau = 0.2; the length of a feature is nothing."""
    pairs = torch.eye(4, 8)
    assert moco().loss(pairs, pairs).item() == pytest.approx(0.4 * 0.020012, abs=1e-6)
    assert moco().loss(3 * pairs, pairs / 7).item() == pytest.approx(0.4 * 0.020012, abs=1e-6)


def test_each_view_is_asked_for_the_other_one() -> None:
    method, data = moco(), batch()
    x1, x2 = data["image"], data["other"]
    tau, truth = 0.2, torch.arange(8)
    expected = torch.zeros(())
    for asked, answer in ((x1, x2), (x2, x1)):
        q = nn.functional.normalize(method.query(asked), dim=1)
        k = nn.functional.normalize(method.key(answer), dim=1)
        expected = expected + 2 * tau * nn.functional.cross_entropy(q @ k.T / tau, truth)
    loss = method(data, START).loss
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    swapped = data | {"image": x2, "other": x1}
    assert method(swapped, START).loss.item() == pytest.approx(loss.item(), abs=1e-6)


def test_heads_are_those_of_the_paper() -> None:
    with torch.device("meta"):
        projector, predictor = projection_head(768, 3, 4096, 256), projection_head(256, 2, 4096, 256)
    for head, shapes in (
        (projector, [(4096, 768), (4096, 4096), (256, 4096)]),
        (predictor, [(4096, 256), (256, 4096)]),
    ):
        linear = [module for module in head if isinstance(module, nn.Linear)]
        assert [tuple(module.weight.shape) for module in linear] == shapes
        assert all(module.bias is None for module in linear)
        block = [nn.Linear, nn.BatchNorm1d, nn.ReLU]
        assert [type(module) for module in head] == (block * len(linear))[:-1]
        assert [module.affine for module in head if isinstance(module, nn.BatchNorm1d)] == [
            *[True] * (len(linear) - 1),
            False,
        ]


def test_patch_embedding_and_positions_stay_as_they_were_drawn() -> None:
    method = moco()
    frozen = {name for name, p in method.encoder.named_parameters() if not p.requires_grad}
    assert frozen == {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.bias"}
    trained = [id(p) for group in method.parameter_groups() for p in group["params"]]
    slow = [*method.momentum_encoder.parameters(), *method.momentum_projector.parameters()]
    assert not set(trained) & {id(p) for p in slow}


def test_the_last_bias_of_the_encoder_means_nothing_to_the_loss() -> None:
    """Why it is frozen: the BatchNorm after the next layer subtracts it."""
    method, data = moco(), batch()
    before = method(data, START).loss
    nn.init.normal_(method.encoder.norm.bias)
    assert method(data, START).loss.item() == pytest.approx(before.item(), abs=1e-5)


def test_the_feature_is_the_cls_token_in_training_and_in_what_is_exported() -> None:
    method, seen = moco(), []

    def keep(_: nn.Module, __: object, tokens: Tensor) -> None:
        tokens.retain_grad()
        seen.append(tokens)

    method.encoder.norm.register_forward_hook(keep)
    method(batch(), START).loss.backward()
    assert len(seen) == 2
    for tokens in seen:
        assert tokens.grad[:, 1:].abs().max() == 0 and tokens.grad[:, 0].abs().max() > 0
    images = batch()["image"]
    assert torch.equal(method.export()(images), method.encoder.forward_features(images)[:, 0])


def test_the_slow_network_starts_equal_and_follows_ever_more_slowly() -> None:
    method = moco()
    pairs = [(method.momentum_encoder, method.encoder), (method.momentum_projector, method.projector)]
    for slow, fast in pairs:
        assert all(torch.equal(a, b) for a, b in zip(slow.parameters(), fast.parameters(), strict=True))
    slow, fast = method.momentum_projector[0].weight, method.projector[0].weight
    moves = []
    for step in (0, 5, 10):
        nn.init.zeros_(slow)
        nn.init.ones_(fast)
        method.after_step(Progress(step=step, epoch=0, total_steps=10))
        moves.append(slow.mean().item())
    assert moves == pytest.approx([0.01, 0.005, 0.0], abs=1e-7)


def test_each_network_sees_each_view_once_and_the_slow_one_without_gradients() -> None:
    method = moco()
    calls: list[tuple[str, bool]] = []
    for name in ("encoder", "momentum_encoder"):
        norm = method.get_submodule(name).norm
        norm.register_forward_hook(lambda _, __, out, name=name: calls.append((name, out.requires_grad)))
    method(batch(), START).loss.backward()
    assert sorted(calls) == [("encoder", True)] * 2 + [("momentum_encoder", False)] * 2
    assert all(p.grad is None for p in method.momentum_encoder.parameters())


def test_two_asymmetric_views_of_byol() -> None:
    views = MoCoV3.views(MoCoV3Config(), 32)
    assert list(views) == ["image", "other"]
    drawn = {name: (view.photometry.blur_p, view.photometry.solarize_p) for name, view in views.items()}
    assert drawn == {"image": (1.0, 0.0), "other": (0.1, 0.2)}
    for view in views.values():
        assert (view.size, view.crop_scale, view.flip) == (32, (0.08, 1.0), 0.5)
        assert view.photometry.jitter == (0.4, 0.4, 0.2, 0.1)
        assert (view.photometry.jitter_p, view.photometry.gray_p) == (0.8, 0.2)
    pixels, keys = torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), sample_keys(0, 0, torch.arange(4))
    one, two = (finish(pixels, view, keys, name) for name, view in views.items())
    assert not torch.allclose(one, two)


def test_a_network_without_tokens_is_refused() -> None:
    with pytest.raises(ValueError, match="got model Linear, expected a ViT"):
        MoCoV3(MoCoV3Config(), Inputs(nn.Linear(2, 2), INFO, no_load, no_load))  # type: ignore[arg-type]


@pytest.mark.slow
def test_neighbours_are_more_often_of_a_class_than_before(real_images: RealImages, tmp_path: Path) -> None:
    """On CIFAR-10 .30 of them, where the untrained network has .26 by CLS and .25 by the mean of its tokens."""
    view = {"crop_scale": [0.2, 1.0], "photometry": JITTER}
    method = {"name": "moco_v3", "dim": 64, "mlp_dim": 256, "momentum": 0.9, "view": view, "other_view": view}
    spec = real_images.contrast(method)
    after = real_images.knn(encoder_of(pretrained(spec, tmp_path, "moco")))
    encoder, before = untrained(spec), []
    for encoder.pool in ("token", "avg"):
        before.append(real_images.knn(encoder))
    assert after > max(before), (after, before)
