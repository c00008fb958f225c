"""LARS and LAMB against the papers' equations in float64, and against timm where it does the same."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from workloads.models import timm_import  # noqa: F401  # from here on timm can be imported
from workloads.parts.optimizers import build
from workloads.spec_training import Optimizer

STEPS, LR = 12, 0.02


def _weights() -> list[nn.Parameter]:
    """A kernel, a matrix, a vector, and a matrix of zeros as some heads start with."""
    draw = torch.Generator().manual_seed(0)
    sizes: list[tuple[int, ...]] = [(4, 3, 2, 2), (5, 4), (5,)]
    return [nn.Parameter(torch.randn(size, generator=draw)) for size in sizes] + [nn.Parameter(torch.zeros(2, 3))]


def _gradients(step: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(100 + step)
    return [torch.randn(p.shape, generator=draw) * 10.0 ** (i - 2) for i, p in enumerate(_weights())]


def _lr(step: int) -> float:
    return LR * (1 + step / STEPS)


def _stepped(optimizer: torch.optim.Optimizer, weights: list[nn.Parameter]) -> list[Tensor]:
    for step in range(STEPS):
        for parameter, gradient in zip(weights, _gradients(step), strict=True):
            parameter.grad = gradient
        for group in optimizer.param_groups:
            group["lr"] = _lr(step)
        optimizer.step()
    return [parameter.detach() for parameter in weights]


def _groups(weights: list[nn.Parameter]) -> list[dict]:
    return [
        {"params": [p for p in weights if p.ndim > 1]},
        {"params": [p for p in weights if p.ndim == 1], "weight_decay": 0.0},
    ]


def _ours(options: Optimizer) -> list[Tensor]:
    weights = _weights()
    return _stepped(build(_groups(weights), options), weights)


def _close(a: list[Tensor], b: list[Tensor]) -> None:
    for left, right in zip(a, b, strict=True):
        assert torch.allclose(left.double(), right.double(), rtol=2e-5, atol=1e-6), (left - right).abs().max()


def _trust(w: Tensor, update: Tensor) -> float:
    w_norm, norm = (w**2).sum().sqrt().item(), (update**2).sum().sqrt().item()
    return w_norm / norm if w_norm > 0 and norm > 0 else 1.0


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_is_its_equations(decay: float, momentum: float) -> None:
    eta = 0.01
    expected = []
    for i, parameter in enumerate(_weights()):
        w = parameter.detach().double()
        m = torch.zeros_like(w)
        for step in range(STEPS):
            d = _gradients(step)[i].double()
            if w.ndim > 1:
                d = d + decay * w
                d = d * (eta * _trust(w, d) if (w != 0).any() else 1.0)
            m = momentum * m + d
            w = w - _lr(step) * m
        expected.append(w)
    _close(_ours(Optimizer(name="lars", weight_decay=decay, momentum=momentum, trust_coefficient=eta)), expected)


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.95)])
def test_lamb_is_algorithm_2(decay: float, betas: tuple[float, float]) -> None:
    beta1, beta2 = betas
    expected = []
    for i, parameter in enumerate(_weights()):
        w = parameter.detach().double()
        m, v = torch.zeros_like(w), torch.zeros_like(w)
        for step in range(STEPS):
            g = _gradients(step)[i].double()
            m = beta1 * m + (1 - beta1) * g
            v = beta2 * v + (1 - beta2) * g**2
            r = (m / (1 - beta1 ** (step + 1))) / ((v / (1 - beta2 ** (step + 1))).sqrt() + 1e-6)
            if w.ndim > 1:
                r = r + decay * w
                r = r * _trust(w, r)
            w = w - _lr(step) * r
        expected.append(w)
    _close(_ours(Optimizer(name="lamb", weight_decay=decay, betas=betas)), expected)


def test_lars_by_hand() -> None:
    """|w| = 5, d = g + 0.1 w = (1, 0), so the step is lr * 0.01 * 5 along it; with momentum 0.5 half of that again."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = build(
        [{"params": [weight]}], Optimizer(name="lars", weight_decay=0.1, momentum=0.5, trust_coefficient=0.01)
    )
    weight.grad = torch.tensor([[0.7, -0.4]])
    optimizer.param_groups[0]["lr"] = 2.0
    optimizer.step()
    assert weight.tolist() == [[pytest.approx(2.9), pytest.approx(4.0)]]
    optimizer.param_groups[0]["weight_decay"] = 0.0
    weight.grad = torch.zeros(1, 2)
    optimizer.step()
    assert weight.tolist() == [[pytest.approx(2.85), pytest.approx(4.0)]]


def test_the_first_step_of_lamb_by_hand() -> None:
    """Without decay each element moves by its sign: the update has length sqrt(2), the weight 5."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]]))
    optimizer = build([{"params": [weight]}], Optimizer(name="lamb", weight_decay=0.0))
    weight.grad = torch.tensor([[0.7, -40.0]])
    optimizer.param_groups[0]["lr"] = 0.1
    optimizer.step()
    step = 0.1 * 5 / 2**0.5
    assert weight.tolist() == [[pytest.approx(3 - step, rel=1e-5), pytest.approx(4 + step, rel=1e-5)]]


def test_lars_is_timms_without_decay() -> None:
    """There the two denominators agree; timm adapts no vector that is in a group of its own."""
    from timm.optim import Lars

    weights = _weights()
    adapted, plain = _groups(weights)
    theirs = Lars([adapted | {"always_adapt": True}, plain], momentum=0.9, trust_coeff=0.01, eps=0.0)
    options = Optimizer(name="lars", weight_decay=0.0, momentum=0.9, trust_coefficient=0.01)
    _close(_ours(options), _stepped(theirs, weights))


def test_lamb_is_timms_without_its_clipping() -> None:
    from timm.optim import Lamb

    weights = _weights()
    theirs = Lamb(_groups(weights), betas=(0.9, 0.999), weight_decay=0.1, max_grad_norm=None)
    _close(_ours(Optimizer(name="lamb", weight_decay=0.1, betas=(0.9, 0.999))), _stepped(theirs, weights))
