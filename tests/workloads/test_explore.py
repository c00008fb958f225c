"""The loop of a search without Ray: to its end, stopped, killed, refused, and what it leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.toy_search import TOY_SEARCH, kept, toy_search
from workloads import explore as loop
from workloads.explore import IslandFile, Turn
from workloads.models.encoders import build_encoder
from workloads.preflight import check
from workloads.record import RunFolder
from workloads.replay_plan import plan
from workloads.run import FAILED, STOPPED, SUCCEEDED, execute, run_local
from workloads.search.pareto import front
from workloads.search.zen_nas import ZenNAS
from workloads.spec import JobSpec, Named
from workloads.spec_search import SearchSpec
from workloads.weights import load_initial
from workloads.winner import read_found, settled, write

SCRIPT = """
import os, signal, sys
from pathlib import Path
from workloads import explore
from workloads.run import run_local
from workloads.search.island import Island
from workloads.spec_search import SearchSpec
explore.SAVE_S = explore.POINT_S = 0.0
kill_at = int(sys.argv[3])
def give(self, results, _give=Island.give):
    _give(self, results)
    if self.told >= kill_at:
        os.kill(os.getpid(), signal.SIGKILL)
Island.give = give
sys.exit(run_local(SearchSpec.model_validate_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2])))
"""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A toy search that went through."""
    run = RunFolder(tmp_path_factory.mktemp("search") / "runs" / "s1")
    assert execute(toy_search(), run, run.path.parents[1], job_id="s1") == SUCCEEDED
    return run


def test_leaves_structure_score_costs_latency_and_population(whole: RunFolder, tmp_path: Path) -> None:
    found, rows = read_found(whole.artifact), kept(whole)
    assert found is not None and found.latency is not None
    assert found.latency.ms > 0 and found.latency.device.startswith("cpu")
    assert found.told == 120 == found.scored + found.spent
    best = rows[0]
    assert (best["candidate"], best["score"], best["parameters"]) == (
        found.structure, found.score, found.costs["parameters"],
    )  # fmt: skip
    assert sum(row["in_population"] for row in rows) == 12 and {row["island"] for row in rows} == {0}
    on_front = [row for row in rows if row["on_front_flops"]]
    assert best in on_front and on_front != [best]
    record, points = whole.read_record(), list(whole.read_metrics())
    assert record is not None and (record.step, record.total_steps) == (120, 120)
    assert points[-1]["best_score"] == found.score
    words = (whole.artifact / "README.md").read_text()
    assert found.structure in words and "`model: {name: job:s1}`" in words
    write(tmp_path / "artifact", found.model_copy(update={"job_id": "local-1"}), rows)  # which no `job:` finds
    assert "`model: {name: the path of this folder}`" in (tmp_path / "artifact" / "README.md").read_text()


def test_what_is_told_between_two_turns_counts_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a report takes its time, in which scorers go on."""
    clock = iter([0.0, 2.0, 2.0, 3.0, 3.0])
    monkeypatch.setattr("workloads.explore.time.monotonic", lambda: next(clock))
    explorer = SimpleNamespace(island=SimpleNamespace(told=10, spent=0, best=None), busy_s=4.0)
    turn = Turn(explorer, 2)  # type: ignore[arg-type]
    explorer.island.told, explorer.busy_s = 20, 7.0
    assert turn.standing() == {"told": 20, "spent": 0, "best": None, "rate": 5.0, "share": 0.75}
    explorer.island.told, explorer.busy_s = 24, 8.0
    assert turn.standing() == {"told": 24, "spent": 0, "best": None, "rate": 4.0, "share": 0.5}


def test_killed_and_resumed_it_finds_the_same(whole: RunFolder, tmp_path: Path) -> None:
    (tmp_path / "job.json").write_text(toy_search().model_dump_json())
    run = RunFolder(tmp_path / "killed")
    for kill_at in (7, 60):
        arguments = [sys.executable, "-c", SCRIPT, str(tmp_path / "job.json"), str(run.path), str(kill_at)]
        assert subprocess.run(arguments, capture_output=True, timeout=120).returncode == -signal.SIGKILL
    state = IslandFile(run, 0).read()
    assert state is not None and 0 < state["told"] < 61
    assert run_local(toy_search(), run.path) == SUCCEEDED
    assert kept(run) == kept(whole)


def test_stopped_and_resumed_it_finds_the_same(
    whole: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "POINT_S", 0.0)  # a point after each chunk
    monkeypatch.setattr(loop, "CHUNK_S", 0.0)  # of one candidate
    run = RunFolder(tmp_path)

    def stop(point: dict[str, Any]) -> None:
        if point["step"] >= 50:
            run.stop.touch()

    assert execute(toy_search(), run, tmp_path, job_id="j", on_point=stop) == STOPPED
    record = run.read_record()
    assert record is not None and record.state == "STOPPED" and 50 <= record.step < 100
    run.stop.unlink()
    assert execute(toy_search(), run, tmp_path, job_id="j", attempt=2) == SUCCEEDED
    assert kept(run) == kept(whole)
    assert execute(toy_search(seed=1), run, tmp_path, job_id="j", attempt=3) == FAILED  # the folder is another job's


def test_islands_take_over_the_best_of_each_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "POINT_S", 0.0)
    monkeypatch.setattr(loop, "SAVE_S", 0.0)
    run = RunFolder(tmp_path)
    spec = toy_search(resources={"workers": 2}, islands=2, migrate_every=20)
    assert execute(spec, run, tmp_path, job_id="j") == SUCCEEDED
    found, rows = read_found(run.artifact), kept(run)
    assert found is not None and found.told == 240
    best = [IslandFile(run, n).read()["best"]["candidate"] for n in range(2)]  # type: ignore[index]
    of_each = [{m["candidate"] for m in IslandFile(run, n).read()["search"]["members"]} for n in range(2)]  # type: ignore[index]
    assert of_each[0] & of_each[1], "nobody moved"
    assert rows[0]["candidate"] in best and len({row["candidate"] for row in rows}) == len(rows)
    assert {row["candidate"] for row in rows if row["in_population"]} == of_each[0] | of_each[1]
    assert {row["island"] for row in rows} == {0, 1}
    searches = [IslandFile(run, n).read()["search"] for n in range(2)]  # type: ignore[index]
    seen = [row for search in searches for row in [*search["members"], *search["fronts"]["flops"]]]
    assert {row["candidate"] for row in rows if row["on_front_flops"]} == {
        row["candidate"] for row in front(seen, "flops")
    }
    assert {row["candidate"] for row in rows} == {row["candidate"] for row in seen}


def test_the_winner_is_a_model_for_other_jobs(
    whole: RunFolder, toy_job: Callable[..., JobSpec], toy_shards: dict[str, str], tmp_path: Path
) -> None:
    home, found = whole.path.parents[1], read_found(whole.artifact)
    assert found is not None
    fields = {"method": {"name": "fine_tune"}, "model": {"name": "job:s1"}, "epochs": None, "steps": 2}
    spec = toy_job(**fields)
    assert check(spec, home) == []
    run = RunFolder(tmp_path / "trained")
    assert execute(spec, run, home, job_id="t", attempt=1) == SUCCEEDED
    held = json.loads(run.spec.read_text())
    assert held["model"] == found.model
    whole_folder, away = whole.path, whole.path.with_name("gone")
    whole_folder.rename(away)  # what was trained knows by itself what it is
    try:
        from workloads.artifact import load_model

        assert load_model(run.artifact)(torch.zeros(1, 3, 8, 8)).shape[-1] > 1
        assert run_local(JobSpec.model_validate(held), run.path) == SUCCEEDED
    finally:
        away.rename(whole_folder)


def test_the_folder_of_a_winner_is_a_model_too(
    whole: RunFolder, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    folder = os.path.relpath(whole.artifact, tmp_path)
    spec = toy_job(method={"name": "fine_tune"}, model={"name": folder, "se": True}, epochs=None, steps=1)
    absolute = spec.absolute(tmp_path)
    assert check(absolute, tmp_path) == []
    found = settled(absolute, tmp_path)
    assert isinstance(found, JobSpec) and found.model.name == "zennet" and found.model.config["se"] is True


def test_weights_of_a_search_that_trained_none_are_refused_and_those_of_others_loaded(
    whole: RunFolder, toy_job: Callable[..., JobSpec], tmp_path: Path
) -> None:
    fields = {"method": {"name": "fine_tune"}, "model": {"name": "job:s1"}, "init": "job:s1"}
    (problem,) = check(toy_job(**fields), whole.path.parents[1])
    assert problem.loc == ["init"] and "a search that trained nothing" in problem.message
    found = read_found(whole.artifact)
    assert found is not None
    network = build_encoder(Named.model_validate(found.model))
    folder = tmp_path / "runs" / "s2" / "artifact"
    folder.parent.mkdir(parents=True)
    write(folder, found, [{"candidate": found.structure}], network.state_dict())
    fields |= {"model": {"name": "job:s2"}, "init": "job:s2"}
    assert check(toy_job(**fields), tmp_path) == []
    fresh = build_encoder(Named.model_validate(found.model))
    load_initial(fresh, "job:s2", tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(network.parameters(), fresh.parameters(), strict=True))


def test_a_search_is_not_replayed(whole: RunFolder) -> None:
    with pytest.raises(ValueError, match="a search, expected a job that trains"):
        plan(whole, 1, 2)


@pytest.mark.parametrize("model", ["job:nothing", "job:", "job:..", "job:../runs/t", "no/such"])
def test_a_model_of_no_job_is_refused(model: str, toy_job: Callable[..., JobSpec], tmp_path: Path) -> None:
    spec = toy_job(model={"name": model})
    (problem,) = check(spec, tmp_path)
    assert problem.loc == ["model", "name"] and "names no finished job" in problem.message
    run = RunFolder(tmp_path / "run")
    assert execute(spec, run, tmp_path, job_id="t") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and "names no finished job" in record.reason


def test_one_candidate_that_fails_is_not_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rate = ZenNAS.rate

    def sometimes(self: ZenNAS, candidate: str, index: int) -> float:
        if index % 3 == 0:
            raise RuntimeError("out of memory")
        return rate(self, candidate, index)

    monkeypatch.setattr(ZenNAS, "rate", sometimes)
    run = RunFolder(tmp_path)
    assert execute(toy_search(), run, tmp_path, job_id="j") == SUCCEEDED
    assert all(row["index"] % 3 for row in kept(run))
    events = [event for event in run.read_events() if event["kind"] == "score_failed"]
    assert len(events) == 3 and "out of memory" in events[0]["message"]  # not one for each


def test_when_all_fail_the_job_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> float:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(ZenNAS, "rate", never)
    run = RunFolder(tmp_path)
    assert execute(toy_search(), run, tmp_path, job_id="j") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None and record.hint is not None
    assert re.search(r"got no score by \d+ candidates, expected some; the last: .*out of memory", record.reason)


def test_scores_that_are_no_numbers_are_failures(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert execute(toy_search({"g": 1e300}), run, tmp_path, job_id="j") == FAILED
    record = run.read_record()
    assert record is not None and record.reason is not None
    assert re.search(r"got no score by \d+ .*got \{'score': nan\}, expected finite numbers", record.reason)


def test_a_latency_that_no_network_has_fails_the_job_at_its_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At POST nobody knows it: it is measured, and where the service runs is not where the job does."""
    monkeypatch.setattr("workloads.search.latency_budget.measure_all", lambda *_, **__: [7.0])
    run, spec = RunFolder(tmp_path), toy_search({"budget": {"latency": {"ms": 1e-9}}})
    assert check(spec, tmp_path) == [] and execute(spec, run, tmp_path, job_id="j") == FAILED
    record, state = run.read_record(), IslandFile(run, 0).read()
    assert record is not None and state is not None and state["told"] < 6  # of 126 turns
    assert record.reason is not None and "got latency: 1e-09 ms, expected more than 7, which the" in record.reason


@pytest.mark.parametrize(
    ("fields", "loc", "says"),
    [
        ({"search": {"name": "zen_nass"}}, ["search", "name"], "did you mean 'zen_nas'"),
        ({"search": {"populatoin": 3}}, ["search", "populatoin"], "got unknown key"),
        ({"search": {"image_size": 10**9}}, ["search", "image_size"], "got an integer above 16,777,216"),
        ({"search": {"batch_size": 10**12}}, ["search", "batch_size"], "got an integer above 16,777,216"),
        ({"search": {"g": float("inf")}}, ["search", "g"], "finite number"),
        (
            {"search": {"budget": {"parameters": 10**12, "latency": {"ms": 1, "batch_size": 10**9}}}},
            ["search", "budget", "latency", "batch_size"],
            "less than or equal to 65536",
        ),
        ({"search": {"budget": {"layers": 2}}}, ["search", "budget", "layers"], "expected at least 6"),
        (
            {"search": {"budget": {"latency": {"ms": 1, "device": "cuda"}}}},
            ["search", "budget", "latency"],
            "name its file in table",
        ),
        ({"data": {"train": {"shards": "x.tar"}}}, ["data"], "got streams train, expected none for search zen_nas"),
        ({"resources": {"workers": 48}}, ["resources", "workers"], "got 48 workers for an island, expected at most 16"),
        ({"init": "nothing@1"}, ["init"], "got nothing@1 for zen_nas, expected none"),
    ],
)
def test_what_is_wrong_is_told_before_it_starts(
    fields: dict[str, Any], loc: list[str], says: str, tmp_path: Path
) -> None:
    problems = check(toy_search(**fields), tmp_path)
    assert [problem.loc for problem in problems] == [loc]
    assert says in problems[0].message


@pytest.mark.parametrize("name", ["genet", "binas"])
def test_searches_of_trained_networks_need_weights_and_have_no_islands(name: str, tmp_path: Path) -> None:
    search: dict[str, Any] = {"name": name, "budget": {"latency": {"ms": 1e9}}}
    if name == "genet":
        search["master"] = {"name": "genet_light"}
    (problem,) = check(SearchSpec.model_validate({"name": "s", "search": search}), tmp_path)
    assert problem.loc == ["init"] and f"got None for {name}, expected the weights that it measures" in problem.message
    spec = SearchSpec.model_validate({"name": "s", "search": search, "islands": 2, "resources": {"workers": 2}})
    (problem,) = check(spec, tmp_path)
    assert problem.loc == ["islands"]


def test_sizes_of_a_search_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match="got 3 workers for 2 islands, expected a multiple; use 2"):
        toy_search(resources={"workers": 3}, islands=2)
    with pytest.raises(ValueError, match="expected one number for a search"):
        toy_search(resources={"workers": [1, 2]})


def test_paths_are_taken_from_the_file_of_the_job(tmp_path: Path) -> None:
    search = TOY_SEARCH | {"budget": {"latency": {"ms": 1, "table": "v100.json"}}}
    spec = SearchSpec.model_validate({"name": "s", "search": search, "data": {"train": {"shards": "a.tar"}}})
    absolute = spec.absolute(tmp_path)
    assert absolute.search.config["budget"]["latency"]["table"] == str(tmp_path / "v100.json")
    assert absolute.data["train"].shards == str(tmp_path / "a.tar")
    assert absolute.absolute(Path(os.sep)) == absolute
