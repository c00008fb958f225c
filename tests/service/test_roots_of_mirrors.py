"""Where a job may write copies of its checkpoints: not where it may read, and never where runs and models lie."""

from __future__ import annotations

from pathlib import Path

import pytest

from service.errors import InvalidSpec
from service.parts import build_parts
from service.principal import ALL, LOCAL, Principal
from service.roots import Roots
from service.settings import Settings
from tests.service.fakes import FakeRay
from tests.service.secured import BODY, Secured
from workloads.preflight import Problem
from workloads.spec import JobSpec

MIRRORS = ("/copies", "s3://bucket/copies", "file:///nfs")
HOME = Path("/var/manta")


def check(mirror: str, mirrors: tuple[str, ...] | None = MIRRORS, home: Path = HOME) -> list[Problem]:
    """Problems of a job of somebody who may read everything."""
    spec = JobSpec.model_validate(BODY | {"checkpoint": {"mirror": mirror}})
    return Roots(("*",), mirrors, home).problems(spec, lambda *_: True)


@pytest.mark.parametrize("mirror", ["/copies", "/copies/of/ours", "s3://bucket/copies/x", "file:///nfs/x"])
def test_what_is_allowed(mirror: str) -> None:
    assert check(mirror) == [] and check(mirror, ("*",)) == []
    (problem,) = check(mirror, None)
    assert "below what is allowed for mirrors (none is)" in problem.message


@pytest.mark.parametrize(
    "mirror",
    [
        "/data/sets",
        "/copies-of-others",
        "/copies/../data",
        "/copies/{a,..}/x",
        "copies",
        "~/copies",
        "s3://bucket/sets",
        "s3://bucket/copies-of-others",
        "s3://bucket/copies/../sets",
        "s3://bucket/copies/x?endpoint_override=http:%2F%2Fevil",
        "s3://bucket/copies/x?%65ndpoint_override=http:%2F%2Fevil",
        "file:///etc",
    ],
)
def test_what_may_be_read_may_not_be_written(mirror: str) -> None:
    (problem,) = check(mirror)
    assert problem.loc == ["checkpoint", "mirror"] and "for mirrors (/copies, s3://bucket/copies" in problem.message


@pytest.mark.parametrize("mirrors", [("*",), ("/",), ("/var", "file:///var"), ("/var/manta", "file:///var/manta")])
@pytest.mark.parametrize(
    "mirror",
    [
        "/var/manta",
        "/var/manta/runs/job-1/checkpoints",
        "/var/manta/registry",
        "/var//manta/./runs",
        "/data/../var/manta/runs",
        "file:///var/manta/runs",
        "FILE:///var/manta/runs",
        "file://localhost/var/manta/runs",
        "file:///var/m%61nta/runs",
        "file:////var/manta/runs",
    ],
)
def test_nothing_is_written_into_the_home_of_the_installation(mirror: str, mirrors: tuple[str, ...]) -> None:
    (problem,) = check(mirror, mirrors)
    assert problem.loc == ["checkpoint", "mirror"] and problem.hint


def test_nor_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "home" / "runs").mkdir(parents=True)
    (tmp_path / "copies").mkdir()
    for name in ("out", "{out}", "o*t"):
        (tmp_path / "copies" / name).symlink_to(tmp_path / "home")
    for name, fine in (("in", True), ("out", False), ("out/runs", False), ("{out}", False), ("o*t/runs", False)):
        for mirrors in (("*",), (str(tmp_path / "copies"),)):
            found = check(f"{tmp_path}/copies/{name}", mirrors, tmp_path / "home")
            assert (found == []) is fine, (name, mirrors)


def test_a_secret_in_the_url_of_a_mirror_is_refused() -> None:
    (problem,) = check("s3://canary:canary@bucket/copies/x", ("*",))
    assert "canary" not in str(problem)


def test_by_default_nothing_where_there_are_tokens_and_anything_on_a_laptop(tmp_path: Path) -> None:
    body = BODY | {"data": {"train": {"shards": "/data/x.tar"}}, "checkpoint": {"mirror": str(tmp_path / "copies")}}
    ann = Principal("ann", ALL, "admin", "tok-1")
    service = Secured(tmp_path / "a")
    for by in (ann, LOCAL):  # LOCAL: somebody has set what may be read, and nothing else
        with pytest.raises(InvalidSpec, match=r"for mirrors \(none is\)"):
            service.parts.submissions.submit(body, None, by)
    service.close()
    service = Secured(tmp_path / "b", mirror_roots=(str(tmp_path),))
    service.parts.submissions.submit(body, None, ann)
    with pytest.raises(InvalidSpec, match="in the home of the installation"):
        change = {"checkpoint": {"mirror": str(tmp_path / "b" / "runs" / "job-1" / "checkpoints")}}
        service.parts.submissions.submit(body | change, None, ann)
    service.close()
    parts = build_parts(
        Settings(home=tmp_path / "c", database_url=""),
        ray=FakeRay(),  # type: ignore[arg-type]
        check=lambda *_: [],
        wake=lambda: None,
    )
    parts.submissions.submit(body)
    parts.store.close()
