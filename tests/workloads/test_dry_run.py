"""What a dry run says is what a run then does."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.toy_search import toy_search
from workloads.dry_run import Refused, Searching, Training, dry_run
from workloads.estimate import estimate
from workloads.spec import JobSpec


def test_it_counts_what_a_run_would_do(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    spec = toy_job(epochs=3)
    found = dry_run(spec, tmp_path)
    assert isinstance(found, Training)
    cost = estimate(spec, tmp_path, samples=80, num_classes=4)
    assert (found.parameters, found.step_flops, found.activation_bytes) == (
        cost.parameters,
        cost.flops,
        cost.activation_bytes,
    )
    assert (found.samples, found.epoch_steps, found.steps, found.notes) == ({"train": 80}, 10, 30, [])
    assert found.flops == 30 * (cost.flops or 0) > 0
    assert found.decode_s is not None and found.decode_s > 0


def test_a_part_of_the_data_is_counted_as_a_part_and_nothing_is_kept(
    toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for path in Path(toy_shards["train"]).parent.glob("*.t*"):
        if path.suffix in (".tar", ".txt"):
            shutil.copy(path, folder)
    before = sorted(folder.iterdir())
    shards = toy_shards["train"].replace(str(Path(toy_shards["train"]).parent), str(folder))
    found = dry_run(toy_job(data={"train": {"shards": shards, "per_class": 4}}), tmp_path)
    assert isinstance(found, Training)
    assert (found.samples, found.epoch_steps, found.steps) == ({"train": 16}, 2, 4)
    assert sorted(folder.iterdir()) == before


def test_what_only_the_data_tell_is_refused_with_its_place(toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    with pytest.raises(Refused, match="81") as refused:
        dry_run(toy_job(batch_size=81), tmp_path)
    assert refused.value.problem.loc[0] == "data"
    with pytest.raises(Refused, match="one visible patch at least"):
        dry_run(toy_job(method={"name": "mae", "mask_ratio": 0.99}), tmp_path)


def test_a_search_tells_its_candidates_its_budget_and_the_least_costs(tmp_path: Path) -> None:
    found = dry_run(toy_search(islands=2, resources={"workers": 2}), tmp_path)
    one = dry_run(toy_search(), tmp_path)
    assert isinstance(found, Searching) and isinstance(one, Searching)
    assert found.candidates == 2 * one.candidates and one.candidates >= 120
    assert one.budget == {"parameters": 200_000, "layers": 10}
    assert 0 < one.least["parameters"] <= 200_000 and one.least["layers"] <= 10
