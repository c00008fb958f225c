"""What fits at all, and hints that are taken at their word."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from service.fitting import misfit
from service.usage import Quota
from tests.service.world import BODY
from workloads.spec import JobSpec
from workloads.spec_search import SearchSpec

NONE = "no smaller one fits: ask for other resources, nodes or quotas"


def hint(nodes: list[dict[str, float]], gpus: float | None = None, batch: int = 256, **resources: Any) -> str:
    spec = JobSpec.model_validate(BODY | {"batch_size": batch, "resources": resources})
    problem = misfit(spec, nodes, "a", Quota(gpus))
    return "" if problem is None else problem.hint


@pytest.mark.parametrize(
    ("nodes", "resources", "said"),
    [
        ([{"CPU": 6.0}], {"workers": 8}, "resources.workers: 4 fits"),  # six do not share 256 samples
        ([{"CPU": 6.0}], {"workers": [7, 8], "batch": 56}, "resources.workers: [4, 4] fits"),
        ([{"CPU": 4.0}], {"workers": 3, "cpus_per_worker": 8, "batch": 9}, "resources.cpus_per_worker: 4 and "
         "resources.workers: 1 fits"),
        ([{"CPU": 4.0}], {"custom_per_worker": {"rack": 1}}, NONE),
        ([{"CPU": 0.0, "GPU": 8.0}], {}, NONE),
        ([{"CPU": 0.0, "GPU": 8.0}, {"CPU": 2.0}], {"cpus_per_worker": 4}, "resources.cpus_per_worker: 2 fits"),
        ([{"CPU": 4.0, "rack": 0.5}], {"custom_per_worker": {"rack": 1}}, "resources.custom_per_worker.rack: 0.5 fits"),
        ([{"CPU": 4.0}], {"gpus_per_worker": 1}, "resources.gpus_per_worker: 0 fits"),
        ([], {"gpus": 2.5, "gpus_per_worker": 4}, "resources.gpus_per_worker: 2 fits"),
        ([], {"gpus": 5, "workers": [1, 8], "gpus_per_worker": 1}, "resources.workers: [1, 4] fits"),
        ([{"CPU": 8.0}], {"workers": 8}, ""),
    ],
)  # fmt: skip
def test_the_smallest_change(nodes: list[dict[str, float]], resources: dict[str, Any], said: str) -> None:
    assert hint(nodes, **resources) == said


def test_islands_share_the_workers_of_a_search() -> None:
    body = {"name": "s", "search": {"name": "zen_nas"}, "islands": 3, "resources": {"workers": 9}}
    problem = misfit(SearchSpec.model_validate(body), [{"CPU": 8.0}], "a", Quota())
    assert problem is not None and problem.hint == "resources.workers: 6 fits"


NODES = st.lists(
    st.fixed_dictionaries(
        {"CPU": st.sampled_from([0.0, 1.0, 4.0, 16.0])},
        optional={"GPU": st.sampled_from([0.0, 0.5, 2.0, 8.0]), "rack": st.sampled_from([0.0, 0.5, 1.0, 4.0])},
    ),
    max_size=4,
)
RESOURCES = st.fixed_dictionaries(
    {
        "workers": st.integers(1, 12) | st.tuples(st.integers(1, 6), st.integers(6, 12)).map(list),
        "cpus_per_worker": st.integers(1, 20),
        "gpus_per_worker": st.sampled_from([0.0, 0.5, 1.0, 4.0]),
        "custom_per_worker": st.sampled_from([{}, {"rack": 0.5}, {"rack": 2.0}]),
    }
)


def changed(resources: dict[str, Any], hint: str) -> dict[str, Any]:
    """As a user would who does what the hint says."""
    found = resources | {"custom_per_worker": dict(resources["custom_per_worker"])}
    for change in hint.removesuffix(" fits").split(" and "):
        path, value = change.removeprefix("resources.").split(": ")
        holder, _, name = path.rpartition(".")
        (found[holder] if holder else found)[name] = json.loads(value)
    return found


@given(NODES, RESOURCES, st.sampled_from([6, 7, 8, 24, 120]), st.none() | st.sampled_from([0.0, 0.5, 1.0, 2.5, 8.0]))
def test_a_hint_resubmitted_is_a_job_and_fits(
    nodes: list[dict[str, float]], resources: dict[str, Any], batch: int, gpus: float | None
) -> None:
    def refused(resources: dict[str, Any]) -> str | None:
        spec = JobSpec.model_validate(BODY | {"batch_size": batch, "resources": resources})
        problem = misfit(spec, nodes, "a", Quota(gpus))
        return None if problem is None else problem.hint

    try:
        said = refused(resources)
    except ValidationError:
        assume(False)
    if said == NONE:  # not with any other number of workers, one or more
        for workers in range(1, 12):
            if batch % workers == 0:
                assert refused(resources | {"workers": workers}) is not None
    elif said is not None:
        assert refused(changed(resources, said)) is None
