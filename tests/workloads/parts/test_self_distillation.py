"""Self-distillation against the golden numbers of the cards that use DINO, and what its parts promise."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

from workloads.models.timm_import import timm
from workloads.models.vit import ViT, ViTConfig
from workloads.parts.self_distillation import (
    Centre,
    cross_view_entropy,
    entropy,
    sharpened,
    teacher_of,
    teacher_temperature,
)

SMALL = ViTConfig(image_size=16, patch_size=4, dim=16, depth=2, heads=2)


def sines(rows: int, columns: int, k: float) -> Tensor:
    """The cards' recipe S(shape; k): sin(k), sin(2 k), ... row by row."""
    return (k * torch.arange(1, rows * columns + 1).double()).sin().view(rows, columns).float()


def loss_of(student: Tensor, teacher: Tensor, crops: int) -> float:
    targets = sharpened(teacher, torch.zeros(teacher.shape[1]), 0.04).chunk(2)
    return cross_view_entropy(targets, (student / 0.1).chunk(crops)).item()


def moved(teacher: Tensor) -> list[float]:
    centre = Centre(teacher.shape[1], 0.9)
    centre.put(teacher)
    centre.turn()
    return centre.value.tolist()


def test_golden_of_transreid_ssl() -> None:
    """The card of TransReID-SSL (arXiv 2111.12084): 2 images, 4 crops, 5 places."""
    assert loss_of(sines(8, 5, 1.1), sines(4, 5, 0.6), 4) == pytest.approx(8.513079134, rel=1e-6)
    expected = [0.006483415, 0.003856412, -0.000117747, -0.004050773, -0.006568748]
    assert moved(sines(4, 5, 0.6)) == pytest.approx(expected, abs=1e-8)


def test_golden_of_solider() -> None:
    """The card of SOLIDER (arXiv 2303.17602): 1 image, 3 crops, 2 places, 4 pairs."""
    student = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert loss_of(student, student[:2], 3) == pytest.approx(7.500046, abs=1e-6)
    assert moved(student[:2]) == pytest.approx([0.05, 0.05], abs=1e-7)


def test_only_a_crop_with_itself_is_no_pair() -> None:
    """6 of the 8 pairs of 4 crops: each entropy that may count is 1 where the student says 1/e of that place."""
    asked: list[tuple[int, int]] = []
    for a in range(2):
        for b in range(4):
            targets = [torch.eye(1, 2) if i == a else torch.zeros(1, 2) for i in range(2)]
            logits = [torch.tensor([[0.0, math.log(math.e - 1)]]) if i == b else torch.eye(1, 2) * 99 for i in range(4)]
            loss = cross_view_entropy(targets, logits).item()
            assert loss == pytest.approx(0 if a == b else 1 / 6, abs=1e-6)
            asked += [(a, b)] if loss > 0.1 else []
    assert asked == [(a, b) for a in range(2) for b in range(4) if a != b]


def test_the_teacher_is_centred_sharpened_and_gets_no_gradient() -> None:
    logits = torch.tensor([[0.3, 0.1]], requires_grad=True)
    p = sharpened(logits, torch.tensor([0.2, 0.1]), 0.05)
    assert p.tolist() == [pytest.approx([1 / (1 + math.exp(-2)), 1 / (1 + math.exp(2))], rel=1e-5)]
    assert not p.requires_grad
    assert entropy(sharpened(logits, logits.detach()[0], 0.05)).item() == pytest.approx(math.log(2))


def test_entropy_is_between_one_place_and_all() -> None:
    assert entropy(torch.eye(3)).item() == 0
    assert entropy(torch.full((2, 8), 1 / 8)).item() == pytest.approx(math.log(8))


@pytest.mark.parametrize("warmup", [0, 1, 2, 30])
def test_temperature_of_the_teacher(warmup: int) -> None:
    """From the first to the last epoch of the warm-up, both ends included, as the released code counts."""
    taus = [teacher_temperature(epoch, 0.04, 0.07, warmup) for epoch in range(40)]
    assert taus[warmup:] == [0.07] * (40 - warmup)
    assert warmup == 0 or taus[0] == 0.04
    assert warmup < 2 or taus[warmup - 1] == pytest.approx(0.07)
    steps = [b - a for a, b in itertools.pairwise(taus[:warmup])]
    assert steps == pytest.approx([0.03 / max(warmup - 1, 1)] * len(steps))


def test_the_centre_moves_once_a_step_however_the_batch_was_divided() -> None:
    logits = sines(8, 5, 0.7)
    whole, parts = Centre(5, 0.9), Centre(5, 0.9)
    for _ in range(3):
        before = parts.value.clone()
        whole.put(logits)
        for part in logits.chunk(4):
            parts.put(part)
            assert torch.equal(parts.value, before)
        whole.turn()
        parts.turn()
        assert not torch.equal(parts.value, before)
    assert torch.allclose(whole.value, (1 - 0.9**3) * logits.mean(dim=0), atol=1e-7)
    assert torch.allclose(parts.value, whole.value, atol=1e-7)
    assert set(parts.state_dict()) == {"value"} and not list(parts.parameters())


def test_the_centre_stays_between_steps_and_out_of_training() -> None:
    centre = Centre(2, 0.9)
    centre.put(torch.ones(3, 2))
    assert centre.value.tolist() == [0, 0]
    centre.turn()
    moved = centre.value.clone()
    centre.turn()
    centre.eval().put(torch.ones(3, 2))
    centre.turn()
    assert torch.equal(centre.value, moved)


def test_a_teacher_is_equal_not_trained_and_never_drops_a_path() -> None:
    torch.manual_seed(0)
    swin = {"img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 8, "depths": (2, 2), "num_heads": (1, 2)}
    networks: list[nn.Module] = [
        ViT(SMALL, drop_path=0.9),
        timm.models.swin_transformer.SwinTransformer(**swin, num_classes=0, drop_path_rate=0.9),
    ]
    for student, size in zip(networks, (16, 32), strict=True):
        teacher, images = teacher_of(student.train()), torch.randn(8, 3, size, size)
        assert teacher.training and not any(p.requires_grad for p in teacher.parameters())
        assert torch.equal(teacher(images), student.eval()(images))
        student.train()
        assert not torch.equal(student(images), student(images)), "the student goes on dropping paths"
        assert all(torch.equal(a, b) for a, b in zip(teacher.parameters(), student.parameters(), strict=True))
