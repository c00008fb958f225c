"""What others have in the installation is not reached by a path, whatever is allowed to read."""

from __future__ import annotations

import os
from fnmatch import fnmatchcase
from pathlib import Path

import pytest
from braceexpand import UnbalancedBracesError, braceexpand
from hypothesis import given
from hypothesis import strategies as st

from service.roots import Kind, Roots
from tests.service.secured import BODY
from workloads.preflight import Problem
from workloads.spec import JobSpec

HOME = Path("/var/manta")


def of_a_project(kind: Kind, name: str) -> bool:
    return name == "job-1" if kind == "job" else name not in ("theirs", "normal")  # another name may be public weights


def check(text: str, root: str = "*", home: Path = HOME, readable: object = of_a_project) -> list[Problem]:
    """Problems of a job that names `text` where a method reads it."""
    data = {"train": {"shards": "x.tar"}}
    spec = JobSpec.model_validate(BODY | {"data": data, "method": {"name": "m", "deep": [{"file": text}]}})
    return Roots((root,), None, home).problems(spec, readable)  # type: ignore[arg-type]


@pytest.mark.parametrize("root", ["*", "/"])
@pytest.mark.parametrize(
    "text",
    [
        "/data/train-{000000..000009}.tar",
        "/data/*/[ab]?.tar",
        "/etc/passwd",
        "/elsewhere/runs/theirs/x",
        "/var/manta/runs/job-1/evaluations/scores.parquet",
        "/var/manta/runs/job-1/{a,b}/*.tar",
        "/var/manta/registry/ours/1",
        "/var/manta-2/x",
    ],
)
def test_the_rest_is_anybodys(text: str, root: str) -> None:
    assert check(text, root) == []


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/*/x-{0..9}.tar",
        "https://host/data/../x",
        "anywhere/x",
        "hf-hub:somebody/model",
        "runs-2/x",
        "runs/job-1/artifact",
    ],
)
def test_with_a_star_also_what_is_elsewhere(text: str) -> None:
    assert check(text) == []


@pytest.mark.parametrize("root", ["*", "/", "/var", "file:///"])
@pytest.mark.parametrize(
    "text",
    [
        "/var/manta/runs/theirs/artifact",
        "/var/manta/registry/theirs/1",
        "/var/manta/runs",
        "/var//manta/./runs/theirs/artifact",
        "/data/../var/manta/runs/theirs/artifact",
        "/var/manta/runs/job-1/../theirs/artifact",
        "/var/manta/runs/*/artifact",
        "/var/manta/runs/{job-1,theirs}/artifact",
        "/var/manta/ru{n,x}s/theirs/artifact",
        "/*/manta/runs/theirs/artifact",
        "/data/{a,b}/../../var/manta/runs/theirs/x",
        "{/var/manta/runs/theirs/x,/data/y}",
        "{/data/y,/var/manta/runs/theirs/x}",
        "{v,w}ar/manta/runs/theirs/x",
        "~/runs/theirs/artifact",
        "../manta/runs/theirs/artifact",
        "var/manta/runs/theirs/artifact",
        "manta/runs/theirs/artifact",
        "runs/theirs/artifact",
        "file:///var/manta/runs/theirs/artifact",
        "FILE:///var/manta/runs/theirs/artifact",
        "file:///var/manta/%72uns/theirs/artifact",
        "local:///var/manta/runs/theirs/artifact",
        "simplecache::file:///var/manta/runs/theirs/artifact",
        "zip://x::file:///var/manta/runs/theirs/artifact",
        "local-dir:/var/manta/runs/theirs/artifact",
    ],
)
def test_runs_and_models_of_others_are_not(text: str, root: str) -> None:
    (problem,) = check(text, root)
    assert problem.loc == ["method", "deep", 0, "file"] and problem.message and problem.hint


@pytest.mark.parametrize("root", ["*", "/"])
def test_nor_by_a_link(root: str, tmp_path: Path) -> None:
    (tmp_path / "home" / "runs" / "theirs").mkdir(parents=True)
    (tmp_path / "home" / "runs" / "job-1").mkdir()
    for name in ("theirs", "job-1"):
        (tmp_path / name).symlink_to(tmp_path / "home" / "runs" / name)
    (tmp_path / "brackets[1]").symlink_to(tmp_path / "home" / "runs" / "theirs")  # a name may look like a pattern
    (tmp_path / "same").symlink_to(tmp_path / "home")
    for home in ("home", "same"):
        assert check(f"{tmp_path}/job-1/x", root, tmp_path / home) == []
        for way in ("theirs/x", "theirs/*", "brackets[1]", "home/runs/theirs/x", "same/runs/theirs/x"):
            assert check(f"{tmp_path}/{way}", root, tmp_path / home) != [], (way, home)


def test_a_long_list_of_shards_asks_the_database_once() -> None:
    asked = []

    def readable(kind: Kind, name: str) -> bool:
        asked.append((kind, name))
        return False

    data = {"train": {"shards": [f"/data/{i}.tar" for i in range(100)]}}
    assert Roots(("/data",), None, HOME).problems(JobSpec.model_validate(BODY | {"data": data}), readable) == []
    assert asked == [("job", "*")]


def test_who_sees_all_projects_is_asked_nothing() -> None:
    """On a laptop everything is allowed, and all runs are one person's."""
    for text in (
        "/*/x.tar",
        "{/data/y,/z}",
        "~/x.tar",
        "file:///data/x",
        "/var/manta/runs/theirs/artifact",
        "../x.tar",
    ):
        assert check(text, "*", readable=lambda *_: True) == []


PIECES = st.sampled_from([*"/////{},*?[]~:", "..", ".", "var", "manta", "runs", "run", "s", "theirs", "job-1", "a"])


@given(
    st.lists(PIECES, max_size=12).map("".join), st.sampled_from(["", "/", "/var/", "/var/manta/", "/var/manta/runs/"])
)
def test_no_pattern_that_passes_expands_to_a_run_of_others(tail: str, start: str) -> None:
    """The check against what the libraries that read a pattern make of it, from wherever they are started."""
    if check(start + tail):
        return
    try:
        found = [start + tail, *braceexpand(start + tail)]
    except UnbalancedBracesError:
        found = [start + tail]
    for path in found:
        for folder in ("/", "/var", "/var/manta"):
            parts = Path(os.path.normpath(Path(folder) / path)).parts
            theirs = (HOME / "runs" / "theirs").parts
            leads = len(parts) >= len(theirs) and all(map(fnmatchcase, theirs, parts))
            assert not leads, (start + tail, path, folder)
