"""Training of a supernet: its two parts, and who teaches (arXiv 2110.12399)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError

from tests.toy import no_load, random_images
from workloads.methods.base import DataInfo, Inputs, Progress
from workloads.methods.binas import Binas, BinasConfig, kept
from workloads.models.binas_space import Space
from workloads.models.binas_supernet import BinasSupernet
from workloads.models.resnet_cifar import ResNetCifar

SPACE = Space(stem=8, first=8, widths=(8, 16), strides=(1, 2), min_depth=1, max_depth=2, last=16, features=12)
FIRST, SECOND = Progress(step=3, epoch=0, total_steps=10), Progress(step=8, epoch=2, total_steps=10)


def method(encoder: Any = None, **config: Any) -> Binas:
    torch.manual_seed(0)
    data = DataInfo(num_instances=8, num_classes=2, shape=(3, 16, 16))
    inputs = Inputs(encoder=encoder or BinasSupernet(SPACE), data=data, load=no_load, build=no_load)
    return Binas(BinasConfig(**config), inputs)


def test_the_first_part_trains_the_largest_network() -> None:
    ours, batch = method(dropout=0, drop_path=0), random_images(4)
    output = ours(batch, FIRST)
    logits = ours.supernet(batch["image"])
    expected = F.cross_entropy(logits, batch["label"], label_smoothing=0.1)
    assert output.loss is not None and output.loss.item() == pytest.approx(expected.item(), abs=1e-6)
    output.loss.backward()
    assert all(p.grad is not None for p in ours.supernet.parameters())
    smaller = ours.supernet.blocks[1][0].gain2  # type: ignore[union-attr, index]
    assert not smaller.grad[0].any() and smaller.grad[1].any()


def test_the_second_part_is_taught_by_a_copy() -> None:
    ours, batch = method(gamma=2.0, divisor=5.0), random_images(4)
    taught = ours.teacher.maps(batch["image"])
    output = ours(batch, SECOND)
    maps = ours.supernet.maps(batch["image"], SPACE.random_paths(batch["key"]))
    logits, target = ours.supernet.forward_head(maps[-1]), ours.teacher.forward_head(taught[-1]).softmax(dim=1)
    ce = F.cross_entropy(logits, batch["label"])
    kd = (target * (target.log() - logits.log_softmax(dim=1))).sum(dim=1).mean()
    distance = sum((a - b).square().mean() for a, b in zip(maps, taught, strict=True)) / 5
    assert len(maps) == 5  # stem, separable convolution, two stages, last convolution
    assert output.loss is not None and output.loss.item() == pytest.approx((ce + 2 * (kd + distance)).item(), rel=1e-5)
    assert output.metrics["maps"].item() == pytest.approx(distance.item(), rel=1e-5)
    output.loss.backward()
    assert all(p.grad is None for p in ours.teacher.parameters())
    assert all(p.grad is not None for p in ours.supernet.parameters())


def test_the_teacher_is_the_supernet_at_the_end_of_the_first_part() -> None:
    ours, batch = method(largest=0.5), random_images(4)
    ours.train()
    assert not ours.teacher.training and not ours.teacher.conv_stem.weight.requires_grad
    start = {name: value.clone() for name, value in ours.teacher.state_dict().items()}
    for step in range(10):
        progress = Progress(step=step, epoch=0, total_steps=10)
        ours(batch, progress)
        with torch.no_grad():
            for parameter in ours.supernet.parameters():
                parameter.add_(0.01)
        ours.after_step(progress)
        now = ours.teacher.state_dict()
        if step == 3:
            assert all(torch.equal(now[name], value) for name, value in start.items())
        if step == 4:
            copied = {name: value.clone() for name, value in now.items()}
            assert all(torch.equal(value, copied[name]) for name, value in ours.supernet.state_dict().items())
    assert all(torch.equal(now[name], value) for name, value in copied.items())
    assert not torch.equal(ours.supernet.bn1.running_mean, ours.teacher.bn1.running_mean)


@pytest.mark.parametrize(("total", "largest", "steps"), [(400, 0.75, 300), (10, 0.01, 1), (3, 0.5, 2)])
def test_the_share_of_the_first_part(total: int, largest: float, steps: int) -> None:
    assert method(largest=largest).first_part(Progress(step=0, epoch=0, total_steps=total)) == steps


def test_what_is_dropped_belongs_to_the_image() -> None:
    keys = torch.arange(5000)
    factors = kept(keys, torch.tensor([0.0, 0.2, 0.5]), "salt")
    assert factors.mean(dim=0).tolist() == pytest.approx([1, 1, 1], abs=0.05)
    assert sorted(set(factors[:, 1].tolist())) == pytest.approx([0, 1.25])
    assert torch.equal(kept(keys[7:9], torch.tensor([0.0, 0.2, 0.5]), "salt"), factors[7:9])


def test_deeper_blocks_are_dropped_more() -> None:
    """All but the shortcut of an image whose branch is dropped."""
    ours, batch = method(drop_path=0.99, dropout=0), random_images(4)
    x = ours.supernet.maps(batch["image"], keep=torch.zeros(4, 4))
    block: Any = ours.supernet.blocks[1]
    assert torch.equal(block[0](x[1], None, torch.zeros(4)), x[1])  # as wide as what comes in
    assert torch.equal(x[2], x[1])


def test_gains_do_not_decay() -> None:
    ours = method()
    names = {id(p): name for name, p in ours.supernet.named_parameters()}
    free = {names[id(p)] for group in ours.parameter_groups() if group["weight_decay"] == 0 for p in group["params"]}
    assert "blocks.1.0.gain2" in free and "blocks.1.0.bias3" in free and "bn1.weight" in free
    assert "conv_stem.weight" not in free


def test_other_networks_and_data_without_labels_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"got ResNetCifar, expected the supernet .* set model: \{name: binas_supernet\}"
    ):
        method(ResNetCifar(8))
    with pytest.raises(ValidationError, match="largest"):
        BinasConfig(largest=1.0)
