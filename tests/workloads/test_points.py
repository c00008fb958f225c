"""A point of the curve: what it holds, over how many ranks, and which of them the others wait for."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from tests.two_ranks import TwoRanks
from workloads import metrics, step
from workloads.metrics import Curve
from workloads.ranks import Ranks
from workloads.record import RunFolder
from workloads.spec import JobSpec
from workloads.step import Done, seconds_between
from workloads.train import train

Make = Callable[..., JobSpec]

OF_ONE = {"step", "epoch", "loss", "lr", "grad_norm", "samples_per_s", "step_time_s", "data_wait_share", "memory_gib"}
EXTRA_S = 100.0


@contextlib.contextmanager
def second_is_slow(rank: int) -> Iterator[None]:
    """By its clock alone: on rank 1 the second of two moments is so much later."""
    plain, late = step.now, itertools.cycle([0.0, EXTRA_S * rank])

    def now(device: torch.device) -> Any:
        return plain(device) + next(late)  # type: ignore[operator]

    with mock.patch.object(step, "now", now):
        yield


def in_range(point: dict[str, Any], batch_size: int) -> None:
    assert point["step_time_s"] > 0 and 0 <= point["data_wait_share"] <= 1
    assert point["samples_per_s"] == pytest.approx(batch_size / point["step_time_s"], rel=0.05)
    assert 0.05 < point["memory_gib"] < 64


def test_a_point_of_one_rank(toy_job: Make, tmp_path: Path) -> None:
    spec, run = toy_job(epochs=None, steps=4, log_steps=2), RunFolder(tmp_path)
    assert train(spec, run, tmp_path)
    points = list(run.read_metrics())
    assert [point["step"] for point in points] == [2, 4]
    for point in points:
        assert point.keys() - {"feature_std", "rankme"} == OF_ONE
        in_range(point, spec.batch_size)


def test_a_point_of_two_ranks_names_the_slow_one(toy_job: Make, two_ranks: TwoRanks, tmp_path: Path) -> None:
    spec = toy_job(epochs=None, steps=4, log_steps=2, resources={"workers": 2})
    run = RunFolder(tmp_path / "run")
    two_ranks.train(spec, run, tmp_path, tmp_path / "store", second_is_slow)
    points = list(run.read_metrics())
    assert [point["step"] for point in points] == [2, 4]
    for point in points:
        assert point.keys() - {"feature_std", "rankme"} == OF_ONE | {"rank_skew", "slowest_rank"}
        in_range(point, spec.batch_size)
        assert point["slowest_rank"] == 1
        assert point["rank_skew"] * point["step_time_s"] == pytest.approx(EXTRA_S, rel=0.05)


class Recorded(Ranks):
    """Rank 1 of three that saw the same, but that the others worked alone for so long."""

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        *seen, first, own, last = values.tolist()
        assert (first, last) == (0, 0)
        return torch.tensor([*seen, 4 / 3, own / 3, 3 / 3])


@pytest.mark.parametrize(("alone_s", "skew", "slowest"), [(0.5, 0.2, 0), (1.0, 0.1, 0), (3.0, 0.4, 1)])
def test_time_is_counted_since_the_last_point(
    alone_s: float, skew: float, slowest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([10.0, 20.0, 20.0])  # when made, at the point, at the start of the next
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    curve = Curve(Recorded(1, 3), None, lambda _: None, batch_size=6)
    for loss in (1.0, float("nan")):
        done = Done(torch.tensor(loss), {"a": torch.tensor(2.0)}, torch.tensor(float(loss != loss)), (7.0, 7 + alone_s))
        curve.add(done, wait_s=0.5)  # so that this rank takes 2 alone_s + 1
    assert curve.point(12, 3, lr=0.1) | {"memory_gib": None} == {
        "step": 12,
        "epoch": 3,
        "lr": 0.1,
        "loss": 1.0,
        "a": 2.0,
        "samples_per_s": 1.2,
        "step_time_s": 5.0,
        "data_wait_share": 0.1,
        "memory_gib": None,
        "rank_skew": skew,
        "slowest_rank": slowest,
        "skipped_steps": 1,
    }


def test_moments_of_a_gpu_are_read_when_it_has_come_to_them(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            said.append("asked for")

        def synchronize(self) -> None:
            said.append("waited for")

        def elapsed_time(self, later: Event) -> float:
            assert isinstance(later, Event)
            return 250.0  # ms

    monkeypatch.setattr(torch.cuda, "Event", Event)
    began, ended = (step.now(torch.device("cuda")) for _ in range(2))
    assert said == ["asked for"] * 2
    assert seconds_between(began, ended) == 0.25
    assert said == ["asked for"] * 2 + ["waited for"]
