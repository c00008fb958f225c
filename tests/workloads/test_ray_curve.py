"""The curve of a search of several islands under Ray Tune, without Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from workloads.explore import IslandFile
from workloads.ray_explore import Curve
from workloads.record import RunFolder


def reported(curve: Curve, island: int, told: int, best: float | None) -> None:
    standing: dict[str, Any] = {"told": told, "spent": 0, "best": best, "rate": 10.0, "share": 1.0}
    curve.on_trial_result(1, [], None, {"config": {"island": island}, **standing})


def test_a_search_that_was_restored_goes_on_from_where_all_its_islands_stood(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    first = Curve(str(tmp_path), 2)
    for n, (told, best) in enumerate([(100, 1.0), (140, 9.0)]):
        reported(first, n, told, best)
        state = {"told": told, "spent": 7, "best": {"score": best}}
        IslandFile(run, n).path.write_text(json.dumps(state))
    again = Curve(str(tmp_path), 2)
    reported(again, 0, 110, 2.0)
    reported(again, 1, 150, 9.5)
    points = list(run.read_metrics())
    assert [point["step"] for point in points] == [100, 240, 250, 260]
    assert [point["best_score"] for point in points] == [1.0, 9.0, 9.0, 9.5]
    assert points[2]["candidates_per_s"] == 10  # by the one that told any


def test_an_island_without_a_network_has_a_point_too(tmp_path: Path) -> None:
    IslandFile(RunFolder(tmp_path), 1).path.write_text(json.dumps({"told": 5, "spent": 5, "best": None}))
    reported(Curve(str(tmp_path), 2), 0, 3, None)
    (point,) = RunFolder(tmp_path).read_metrics()
    assert (point["step"], point["best_score"]) == (8, None)
