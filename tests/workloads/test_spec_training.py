"""What the engine is told, and what it refuses to be told."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import TypeAdapter, ValidationError

from workloads.spec import JobSpec
from workloads.spec_training import Resources, Schedule, Seconds


@pytest.mark.parametrize(
    ("text", "seconds"),
    [(90, 90), (1.5, 1.5), ("90", 90), ("soon", None), ("30m", 1800), ("1d 6h", 108000), ("1.5h", 5400)],
)
def test_durations(text: str | float, seconds: float | None) -> None:
    adapter = TypeAdapter(Seconds)
    if seconds is None:
        with pytest.raises(ValidationError, match='expected seconds or a text such as "30m"'):
            adapter.validate_python(text)
    else:
        assert adapter.validate_python(text) == seconds


@pytest.mark.parametrize("schedule", [{"name": "step"}, {"milestones": [3]}, {"name": "step", "milestones": [3, 2]}])
def test_milestones_belong_to_steps_and_grow(schedule: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="milestones"):
        Schedule.model_validate(schedule)


@pytest.mark.parametrize(
    ("custom", "says"),
    [
        ({"GPU": 1}, "that Ray does not use"),
        ({"rack": 0}, "greater than 0"),
        ({"rack": 1.5}, "a part of one or a whole number"),
    ],
)
def test_custom_resources_are_what_ray_can_give_out(custom: dict[str, float], says: str) -> None:
    assert Resources(workers=(2, 8), custom_per_worker={"rack": 0.5, "h100": 2}).custom == {"rack": 1.0, "h100": 4.0}
    with pytest.raises(ValidationError, match=says):
        Resources(custom_per_worker=custom)


def test_elastic_workers_ask_for_the_least_and_share_micro_batches_evenly(toy_job: Callable[..., JobSpec]) -> None:
    spec = toy_job(resources={"workers": [2, 8], "cpus_per_worker": 3}, batch_size=48, micro_batch_size=2)
    assert (spec.resources.min_workers, spec.resources.max_workers, spec.resources.cpus) == (2, 8, 6)
    assert {n: spec.ranks_among(n) for n in range(2, 9)} == {2: 2, 3: 3, 4: 4, 5: 4, 6: 6, 7: 6, 8: 8}
    assert {n: spec.accumulation_on(n) for n in (2, 3, 4, 6, 8)} == {2: 12, 3: 8, 4: 6, 6: 4, 8: 3}
    assert JobSpec.model_validate_json(spec.model_dump_json()) == spec
    with pytest.raises(ValidationError, match=r"expected \[least, most\]"):
        Resources(workers=(4, 2))
