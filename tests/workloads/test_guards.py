"""Divergence, collapse, and features taken from a method in training."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from workloads.data.transforms.volume import VolumeView
from workloads.data.views import View
from workloads.guards import Collapse, CollapseError, Divergence, DivergenceError, features_of
from workloads.methods.base import Method, MethodConfig
from workloads.spec_training import Guards

CALM = [3.0, 2.5, 2.0, 2.0, 1.9]
VIEWS = {"image": View(size=8)}


def curve(losses: list[Any], first_step: int = 10) -> list[dict[str, Any]]:
    return [{"step": first_step + 10 * i, "loss": loss} for i, loss in enumerate(losses)]


def ends_at(losses: list[Any], factor: float | None = 10.0, resumed_after: int = 0) -> int | None:
    """The step at which the run ends; the first points come from the file."""
    points = curve(losses)
    guard = Divergence(factor, points[:resumed_after])
    for point in points[resumed_after:]:
        try:
            guard.look(point)
        except DivergenceError:
            return int(point["step"])
    return None


@pytest.mark.parametrize(
    ("losses", "step"),
    [
        ([*CALM, 31.0, 31.0, 31.0], 80),
        ([*CALM, 30.0, 30.0, 30.0, 30.0], None),  # ten times is not above ten times
        ([*CALM, 31.0, 31.0, 2.0, 31.0, 31.0], None),  # never three in a row
        ([*CALM, 31.0, None, 31.0, math.nan, 31.0], 100),  # points without a loss neither count nor interrupt
        ([None, None, *CALM, 31.0, 31.0, 31.0], 100),  # a memory is filled first
        ([0.0, 0.0, *CALM, 31.0, 31.0, 31.0], 100),
        ([0.0] * 20, None),
        ([100.0, *CALM, 31.0, 31.0, 31.0], None),  # the largest of the first points, not the last
        ([-0.01, -0.02, -0.5, -0.9, -0.95, 0.9, 0.9, 0.9], None),  # negative cosine similarity: of order one
        ([0.01, 0.02, 0.03, 0.01, 0.01, -0.5, 0.9, 0.9, 0.9], None),  # falls below zero later
        ([-0.1, -0.5, -0.9, -0.9, -0.9, 11.0, 11.0, 11.0], 80),
        ([-200.0, *CALM, 31.0, 31.0, 31.0], None),
        ([*CALM, -1e6, -1e7, -1e8], None),  # below zero is not divergence
        ([0.05, 0.04, 0.04, 0.03, 0.03, 0.6, 0.6, 0.6], 80),  # small losses have small scales
    ],
)
def test_divergence(losses: list[Any], step: int | None) -> None:
    assert ends_at(losses) == step
    assert ends_at(losses, factor=None) is None


def test_divergence_says_what_it_saw() -> None:
    guard = Divergence(Guards().divergence, curve([3.0] * 5))
    guard.look({"step": 480, "loss": 40.0})
    guard.look({"step": 490, "loss": 400.0, "lr": 0.1})
    with pytest.raises(DivergenceError) as caught:
        guard.look({"step": 500, "loss": 1234.0})
    assert str(caught.value) == (
        "the loss 1234 at step 500 is 411.3 times the largest of its first points (3), three points in a row"
    )
    assert "optimizer.lr" in caught.value.hint


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.none(), st.floats(-2, 2), st.floats(10, 1e4), st.just(math.inf)), max_size=25),
    st.integers(0, 25),
)
def test_a_resumed_run_ends_where_the_uninterrupted_one_does(losses: list[Any], resumed_after: int) -> None:
    end = ends_at(losses)
    cut = resumed_after if end is None else min(resumed_after, end // 10 - 1)
    assert ends_at(losses, resumed_after=cut) == end


def normal(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def test_well_spread_features_measure_one_and_their_number_of_directions() -> None:
    measured = Collapse(1e-3).look(normal(4096, 8))
    assert measured["feature_std"] == pytest.approx(1.0, abs=0.01)  # SimSiam: 1 / sqrt(d) before the factor
    assert measured["rankme"] == pytest.approx(8.0, abs=0.01)
    plane = normal(4096, 2) @ torch.eye(2, 8)
    assert Collapse(None).look(plane)["rankme"] == pytest.approx(2.0, abs=0.01)


@settings(max_examples=50, deadline=None)
@given(st.integers(2, 12), st.integers(1, 12), st.floats(1e-25, 1e25))
def test_measures_have_bounds_and_no_scale(n: int, d: int, scale: float) -> None:
    features = normal(n, d)
    measured = Collapse(None).look(features)
    assert 0 <= measured["feature_std"] <= 1 + 1e-6
    assert 1 - 1e-4 <= measured["rankme"] <= min(n, d) + 1e-4
    assert Collapse(None).look(features * scale) == pytest.approx(measured, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("features", [torch.full((6, 4), 0.3), torch.zeros(6, 4), torch.ones(6, 1) * 1e30])
def test_collapse_ends_the_run_at_the_second_checkpoint_in_a_row(features: Tensor) -> None:
    guard = Collapse(Guards().min_feature_std)
    measured = guard.look(features)
    assert measured == pytest.approx({"feature_std": 0.0, "rankme": 1.0}, abs=1e-4)
    guard.look(normal(6, 4))
    guard.look(features)
    with pytest.raises(CollapseError, match=r"deviate by .* less than 0.001, at 2 checkpoints in a row") as caught:
        guard.look(features)
    assert "guards.min_feature_std" in caught.value.hint


def test_features_on_a_line_have_collapsed_however_wide_they_are() -> None:
    line = normal(64, 1) @ normal(1, 32)
    guard = Collapse(Guards().min_feature_std, Guards().min_rankme)
    measured = guard.look(line)
    assert measured["feature_std"] > 0.7 and measured["rankme"] < 1.001 and guard.counts
    assert guard.look(line + 0.01 * normal(64, 32))["rankme"] > 1.01 and not guard.counts, "not quite on it"
    guard.look(line)
    with pytest.raises(CollapseError, match=r"^features span 1 directions \(RankMe\), less than 1.01, at 2") as caught:
        guard.look(line)
    assert "guards.min_rankme" in caught.value.hint
    alone = Collapse(None, 1.5)
    assert [alone.look(line[:, :1])["rankme"] for _ in range(3)] == pytest.approx([1.0] * 3), (
        "of one dimension: no sign"
    )


def test_nearly_constant_features_are_told_from_constant_ones() -> None:
    guard = Collapse(1e-3)
    for _ in range(3):
        assert guard.look(1 + 0.01 * normal(64, 32))["feature_std"] == pytest.approx(0.01, rel=0.1)


def test_no_statement_about_one_sample_or_nan() -> None:
    guard = Collapse(1e-3)
    constant = torch.ones(4, 4)
    guard.look(constant)
    nan = constant.clone()
    nan[1, 2] = math.nan
    assert guard.look(constant[:1]) == guard.look(nan) == guard.look(constant * math.inf) == {}
    with pytest.raises(CollapseError):
        guard.look(constant)  # in a row, of those that could be told


def test_collapse_can_be_left_to_the_curve() -> None:
    guard = Collapse(None)
    assert guard.look(torch.ones(4, 4)) == guard.look(torch.ones(4, 4))


class Convolutional(Method):
    """BatchNorm, dropout and a part that stays in eval mode while the rest trains."""

    Config = MethodConfig
    copies = False

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.encoder = nn.Sequential(
            nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten()
        )
        self.teacher = nn.BatchNorm1d(4)

    def export(self) -> nn.Module:
        return copy.deepcopy(self.encoder).train() if self.copies else self.encoder


class Copied(Convolutional):
    copies = True


class Evaluated(Convolutional):
    def export(self) -> nn.Module:
        torch.rand(3)  # a fresh head
        return self.encoder.eval()


class Classifies(Convolutional):
    exports = "classifier"


class TwoStreams(Convolutional):
    streams = ("labeled", "unlabeled")


def in_training(cls: type[Convolutional]) -> Convolutional:
    torch.manual_seed(0)
    method = cls()
    method.train().teacher.eval()
    method.encoder(torch.randn(4, 3, 8, 8)).square().sum().backward()
    return method


@pytest.mark.parametrize("cls", [Convolutional, Copied, Evaluated])
def test_features_leave_the_method_as_it_was(cls: type[Convolutional]) -> None:
    method, images = in_training(cls), torch.randn(300, 3, 8, 8)
    state = {name: value.clone() for name, value in method.state_dict().items()}
    gradients = [None if p.grad is None else p.grad.clone() for p in method.parameters()]
    modes, generator = [part.training for part in method.modules()], torch.get_rng_state()

    features = features_of(method, {"index": torch.arange(300), "image": images}, VIEWS)

    assert features is not None and features.shape == (256, 4) and not features.requires_grad
    assert torch.equal(torch.get_rng_state(), generator)
    assert [part.training for part in method.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in method.state_dict().items())
    for parameter, before in zip(method.parameters(), gradients, strict=True):
        assert parameter.grad is before is None or torch.equal(parameter.grad, before)  # type: ignore[arg-type]
    with torch.no_grad():
        torch.testing.assert_close(features, method.encoder.eval()(images)[:256])


def test_a_failure_puts_the_modes_back_too() -> None:
    method = in_training(Convolutional)
    with pytest.raises(RuntimeError, match="channels"):
        features_of(method, {"image": torch.zeros(2, 5, 8, 8)}, VIEWS)
    assert method.encoder.training and method.encoder[1].training and not method.teacher.training


def test_features_of_the_first_stream_and_the_first_image_view() -> None:
    method, images = in_training(TwoStreams), torch.randn(2, 3, 8, 8)
    batch = {"labeled": {"other": 1, "image": images}, "unlabeled": {}}
    features = features_of(method, batch, {"other": object(), **VIEWS})  # type: ignore[dict-item]
    assert features is not None and features.shape == (2, 4)


def test_features_of_the_slice_in_the_middle_of_each_volume() -> None:
    method, volumes = in_training(Convolutional), torch.randn(2, 3, 5, 8, 8)
    features = features_of(method, {"volume": volumes}, {"volume": VolumeView(size=(5, 8, 8))})
    with torch.no_grad():
        assert features is not None and torch.equal(features, method.encoder.eval()(volumes[:, :, 2]))


def test_no_features_without_an_encoder_or_images() -> None:
    batch = {"image": torch.zeros(2, 3, 8, 8)}
    assert features_of(in_training(Classifies), batch, VIEWS) is None
    assert features_of(in_training(Convolutional), batch, {"image": object()}) is None  # type: ignore[dict-item]


def test_compiled_blocks_are_not_compiled_again() -> None:
    method = in_training(Convolutional)
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    class Block(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).relu()

    method.encoder[0] = Block(nn.Conv2d(3, 4, 3))
    method.encoder[0].compile(backend=backend)
    method.encoder(torch.randn(4, 3, 8, 8))
    assert len(compiled) == 1
    assert features_of(method, {"image": torch.randn(2, 3, 8, 8)}, VIEWS) is not None
    assert len(compiled) == 1
    method.encoder(torch.randn(4, 3, 8, 8))
    assert len(compiled) == 1
