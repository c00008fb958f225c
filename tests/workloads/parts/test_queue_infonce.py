"""The loss against a queue is cross-entropy over all logits, in value and gradient, however it is cut."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from workloads.parts import queue_infonce
from workloads.parts.queue_infonce import queue_info_nce


def given(n: int, size: int, dim: int = 8) -> list[Tensor]:
    torch.manual_seed(n)
    return [F.normalize(torch.randn(rows, dim), dim=1) for rows in (n, n, size)]


@pytest.mark.parametrize("tile", [(1, 1), (2, 3), (5, 7), (256, 1024)])
@pytest.mark.parametrize("tau", [0.2, 0.005])  # of the latter exp(1 / tau) is no float32
def test_it_is_cross_entropy(monkeypatch: pytest.MonkeyPatch, tile: tuple[int, int], tau: float) -> None:
    monkeypatch.setattr(queue_infonce, "CACHED", tile)
    q, k, queue = given(5, 7)
    q.requires_grad_()
    logits = torch.cat([(q * k).sum(dim=1, keepdim=True), q @ queue.T], dim=1) / tau
    expected = F.cross_entropy(logits, torch.zeros(5, dtype=torch.int64), reduction="none")
    found, right = queue_info_nce(q, k, queue, tau)
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(right, logits.argmax(dim=1) == 0) and 0 < right.sum() < 5
    weights = torch.arange(1.0, 6.0)
    slopes = [torch.autograd.grad((weights * loss).sum(), q)[0] for loss in (found, expected)]
    assert torch.allclose(*slopes, rtol=1e-5, atol=2e-6 / tau)


def test_keys_and_queue_get_no_gradient() -> None:
    q, k, queue = (x.requires_grad_() for x in given(3, 4))
    queue_info_nce(q, k, queue, 0.2)[0].sum().backward()
    assert q.grad is not None and k.grad is queue.grad is None


def test_similarities_are_of_float32_also_under_autocast() -> None:
    q, k, queue = given(6, 9)
    expected = queue_info_nce(q, k, queue, 0.2)
    with torch.autocast("cpu", torch.bfloat16):
        found = queue_info_nce(q, k, queue, 0.2)
    assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(expected, found, strict=True))
