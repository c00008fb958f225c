"""A frozen teacher: no gradients, no state in whoever holds it, and images as it knows them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from workloads.data.views import View
from workloads.models.vit import ViTConfig
from workloads.parts.frozen import Frozen, Teacher

SMALL = ViTConfig(image_size=16, patch_size=4, dim=32, depth=1, heads=4)
STUDENT = View(size=16)
HALF = View(size=16, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))


@pytest.fixture
def pixels() -> Tensor:
    """In [0, 1]."""
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def normalised(pixels: Tensor, view: View) -> Tensor:
    return (pixels - torch.tensor(view.mean)[:, None, None]) / torch.tensor(view.std)[:, None, None]


def test_frozen_is_in_eval_mode_for_ever_and_asks_for_no_gradient(pixels: Tensor) -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Dropout())
    frozen = Frozen(module)
    nn.Sequential(frozen).train()
    assert not any(part.training for part in frozen.modules())
    assert not any(parameter.requires_grad for parameter in frozen.parameters())
    assert torch.equal(frozen(pixels), frozen(pixels))
    assert frozen.view is None


def test_a_teacher_is_no_part_of_its_holder() -> None:
    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.own = nn.Linear(2, 2)
            self.teacher = Teacher(Frozen(SMALL.build(), STUDENT), STUDENT)

    holder = Holder()
    assert holder.teacher.width == 32
    assert {name.partition(".")[0] for name in holder.state_dict()} == {"own"}
    assert {name.partition(".")[0] for name, _ in holder.named_parameters()} == {"own"}
    holder.train()
    assert not holder.teacher.module.training


def test_images_are_renormalised_as_the_teacher_knows_them(pixels: Tensor) -> None:
    teacher = Teacher(Frozen(SMALL.build(), HALF), STUDENT)
    seen = teacher.see(normalised(pixels, STUDENT))
    assert torch.allclose(seen, 2 * pixels - 1, atol=1e-5)


@pytest.mark.parametrize("view", [None, STUDENT, STUDENT.model_copy(update={"size": 99, "flip": 0.5})])
def test_images_that_need_no_change_are_passed_on(view: View | None, pixels: Tensor) -> None:
    """The same normalisation, or nobody said; the size of the view is that of a whole image, not of the patches."""
    teacher = Teacher(Frozen(SMALL.build(), view), STUDENT)
    assert teacher.see(pixels) is pixels
    assert teacher.see(pixels, 16) is pixels


@pytest.mark.parametrize("size", [8, 24])
def test_images_are_resized_bilinearly(size: int, pixels: Tensor) -> None:
    seen = Teacher(Frozen(SMALL.build(), STUDENT), STUDENT).see(pixels, size)
    expected = F.interpolate(pixels, (size, size), mode="bilinear", align_corners=False, antialias=True)
    assert torch.equal(seen, expected)
    constant = Teacher(Frozen(SMALL.build(), HALF), STUDENT).see(torch.zeros(1, 3, 16, 16), size)
    assert torch.allclose(constant[0, :, 0, 0], 2 * torch.tensor(STUDENT.mean) - 1, atol=1e-5)


def test_the_precision_of_the_images_stays(pixels: Tensor) -> None:
    assert Teacher(Frozen(SMALL.build(), HALF), STUDENT).see(pixels.bfloat16()).dtype == torch.bfloat16


def test_the_teacher_follows_the_images_to_their_device(pixels: Tensor) -> None:
    teacher = Teacher(Frozen(SMALL.build(), HALF), STUDENT)
    seen = teacher.see(pixels.to("meta"))
    assert {parameter.device.type for parameter in teacher.module.parameters()} == {"meta"}
    assert teacher.module(seen).shape == (2, 32)
