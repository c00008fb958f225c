"""What a search asks Ray for: shares of a GPU, custom resources, and nothing where nothing is done."""

from __future__ import annotations

from typing import Any

import pytest

from tests.toy_search import toy_search
from workloads import ray_explore

SHARE = {"CPU": 1.0, "GPU": 0.25}


@pytest.mark.parametrize(
    ("resources", "islands", "asked"),
    [
        ({"workers": 4, "gpus_per_worker": 0.25}, 1, [SHARE] * 4),
        ({"workers": 4, "gpus_per_worker": 0.25}, 2, [SHARE] * 2),
        ({"workers": 4, "gpus_per_worker": 0.25}, 4, [SHARE]),
        ({"workers": 2, "cpus_per_worker": 3}, 1, [{"CPU": 3.0}] * 2),
        ({"workers": 1, "custom_per_worker": {"h100": 0.5}}, 1, [{"CPU": 1.0, "h100": 0.5}]),
    ],
)
def test_scorers_of_an_island_share_gpus(
    resources: dict[str, Any], islands: int, asked: list[dict[str, float]]
) -> None:
    """The trial that has scorers holds nothing beside theirs; one that scores itself holds a worker's."""
    spec = toy_search(resources=resources, islands=islands)
    found = ray_explore._resources(spec)
    assert [{name: n for name, n in bundle.items() if n} for bundle in found.bundles] == asked
    assert found.head_bundle_is_empty == (len(asked) > 1) and found.strategy == "PACK"


def test_an_actor_has_what_its_bundle_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two scorers on half a GPU each; an actor that dies is started again and asked again."""
    made: list[dict[str, Any]] = []

    class Handle:
        @staticmethod
        def remote(*_: object) -> None:
            return None

    def remote(**options: Any) -> Any:
        made.append(options)
        return lambda _: Handle

    monkeypatch.setattr(ray_explore.ray, "remote", remote)
    spec = toy_search(resources={"workers": 2, "gpus_per_worker": 0.5, "custom_per_worker": {"h100": 1}})
    pool = ray_explore._pool(spec, ray_explore.Path(), 0, None)  # type: ignore[arg-type]
    assert pool.slots == 4
    forever = {"max_restarts": -1, "max_task_retries": -1}
    assert made == [{"num_cpus": 1, "num_gpus": 0.5, "resources": {"h100": 1}} | forever]
